"""Defaults for reasoning models ("Reasoning Language Model Inference Serving Unveiled", arXiv 2510.18672): admit by forecast, not by what is free.

Thinking makes outputs long and of unknown length, and the KV cache swings between empty and full. So a request is let in only if the KV of
all who run, at the worst moment of their expected futures, still fits with ``certainty``. What a request has yet to say is the mean of those
finished outputs that were longer than what it said so far (for heavy tails it grows with age), never more than its limit. And drafts get
shorter as the batch grows, down to none at ``draft_until`` running requests: under load they cost others their first visible token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Facts, Grants
from presage.core.protocols import EngineView
from presage.core.types import Floats, Ints
from presage.schedule.fcfs import Fcfs

MEMORY = 512
"""Finished outputs that make the law of lengths."""
FAR = 1 << 20
"""A length at which the part of a block does not matter."""
ENOUGH = 16
"""Finished outputs below which a request is expected to use ``share`` of its limit."""


class KVForecast(Fcfs):
    """FCFS that reserves the forecast growth of those who run. ``share``: of its limit, expected before anything finished.

    ``certainty``: the study says 0.9. But an eviction costs one recompute, memory held in reserve costs throughput as long as it is held: in
    simulations of heavy tails 0.3 avoids four fifths of the evictions for nothing, 0.9 nearly all for a third of the throughput.
    """

    def __init__(
        self, config: SchedulerConfig | None = None, certainty: float = 0.3, share: float = 0.05, draft_until: int = 32
    ) -> None:  # fmt: skip
        super().__init__(config)
        if not 0 < certainty < 1 or not 0 < share <= 1 or draft_until < 1:
            raise ValueError("certainty and share must be in (0, 1), draft_until at least 1")
        self.z, self.share, self.draft_until = NormalDist().inv_cdf(certainty), share, draft_until
        self.lengths: deque[int] = deque(maxlen=MEMORY)
        self._prompt = np.zeros(0, np.int32)

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """FCFS, with drafts cut to what the load leaves."""
        self._prompt = view.table.prompt.copy()
        room = max(0.0, 1.0 - view.running / self.draft_until)
        return super().plan(view, replace(budget, drafts=int(budget.drafts * room)))

    def observe(self, facts: Facts) -> None:
        """Note the lengths of outputs that ended."""
        for i in np.flatnonzero(facts.new.finish > 0).tolist():
            if facts.new.slot[i] < len(self._prompt):
                self.lengths.append(said_by(facts, i, self._prompt))

    def order(self, view: EngineView) -> Ints:
        """The queue as far as the forecast lets it in; its head always where nobody runs."""
        seats = min(len(view.queue), max(0, view.max_num_seqs - view.running))
        queue = view.queue[:seats]
        who = np.concatenate([view.ready, queue]).astype(np.int32)
        if not seats:
            return view.queue[:1]  # the reason is written down by whoever finds no seat
        mean, spread = self.remaining(view, who)
        held, room = view.known[who].astype(np.float64), self.capacity(view, int(who[0])) * (1 - self.watermark)
        n = len(view.ready)
        for k in range(1, seats + 1):
            if (k > 1 or n) and peak(held[: n + k], mean[: n + k], spread[: n + k], self.z) > room:
                return queue[: k - 1]
        return queue

    def remaining(self, view: EngineView, slots: Ints) -> tuple[Floats, Floats]:
        """Mean and standard deviation [n] of the tokens that each has yet to say."""
        t = view.table
        left, said = np.maximum(0, t.end[slots] - view.known[slots]).astype(np.float64), t.out[slots]
        if len(self.lengths) < ENOUGH:
            return self.share * left, 0.25 * left
        law = np.sort(np.array(self.lengths, np.float64))
        mean, spread = np.empty(len(slots)), np.empty(len(slots))
        for i, age in enumerate(said.tolist()):
            tail = np.minimum(law[np.searchsorted(law, age, side="right") :] - age, left[i])
            # Older than all that finished: nothing is known but the limit.
            mean[i], spread[i] = (tail.mean(), tail.std()) if len(tail) else (left[i], 0.0)
        return mean, spread

    def capacity(self, view: EngineView, slot: int) -> float:
        """Tokens that the cache holds: of the pool that runs out first. Windows stay bounded, so their pools hold any number."""
        return float(FAR * np.min(np.array(view.pools) / np.maximum(1, view.ledger.whole(slot, FAR))))


def said_by(facts: Facts, i: int, prompt: Ints) -> int:
    """Output tokens of span ``i``'s request after the step: what it knew, and what is new, above its ``prompt`` [C]."""
    known = facts.plan.start[i] + facts.plan.count[i] + facts.new.off[i + 1] - facts.new.off[i]
    return int(known - prompt[facts.new.slot[i]])


def peak(held: Floats, mean: Floats, spread: Floats, z: float = 0.0) -> float:
    """Most tokens held at once: requests hold ``held`` [n] now, grow one token a step and end after ``mean`` steps; + z deviations of the sum.

    When the j-th ends, those that are left have grown by its length.
    """
    if not len(held):
        return 0.0
    by = np.argsort(mean, kind="stable")
    h, r = np.asarray(held)[by], np.asarray(mean)[by]
    alive = np.arange(len(h), 0, -1)
    when = np.cumsum(h[::-1])[::-1] + r * alive
    return float(when.max() + z * np.sqrt((np.asarray(spread) ** 2).sum()))
