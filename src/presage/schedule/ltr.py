"""Learning to rank (vLLM-LTR, arXiv 2408.15792): shortest first by a trained score, because order is learnt far better than length.

Higher score = expected shorter. Waiting and running requests are ordered together; a waiting one takes a running one's place if it is better
by ``margin`` of the scores' spread (the paper has none, and thrashes). Starvation: who waited ``patience`` seconds goes first. The scorer is
one worker that takes ``cost`` seconds a request: until it is through with a request, that one counts as median. Below ``least_tau``, measured
on what finished, the order is FCFS: a ranker that went stale only does harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Facts, Grants
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Floats, Ints
from presage.schedule.budget import said_by
from presage.schedule.informed import Informed
from presage.schedule.kendall import kendall_tau

MEMORY = 256
"""Finished requests over which tau is measured, every quarter of them."""


class Ranker(Protocol):
    """Scores prompts (token ids); higher = expected shorter. Pure: equal prompts, equal scores."""

    def score(self, prompts: list[np.ndarray]) -> Floats: ...


class Ltr(Informed):
    """Rank = - score. Scores come from ``ranker`` (or the file ``model``) at arrival, else from the column ``score`` (``Annotate``).

    ``noise``: no ranker at all, but the log of the declared length with Gaussian noise of this deviation, keyed by arrival: a ranker of
    known quality for simulations. ``margin``: in standard deviations of the waiting scores.
    """

    def __init__(
        self, config: SchedulerConfig | None = None, model: str = "", noise: float | None = None, cost: float = 0.0, patience: float = 30.0,
        margin: float = 1.0, least_tau: float = 0.2, ranker: Ranker | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, patience, margin)
        if cost < 0 or (noise is not None and noise < 0):
            raise ValueError("cost and noise must not be negative")
        if model:
            from presage.schedule.ltr_train import LinearRanker

            ranker = LinearRanker.load(Path(model))
        self.noise, self.cost, self.least_tau, self.ranker = noise, cost, least_tau, ranker
        self.scores: dict[int, float] = {}
        self.tau: float | None = None
        self._said: list[tuple[float, int]] = []
        self._news = 0
        self._busy = 0.0
        # By slot: whose score it is (arrival number), the score, when the scorer is through, the rank, prompt tokens.
        self._whose, self._score, self._through, self._rank = np.full(0, -1, np.int64), np.zeros(0), np.zeros(0), np.zeros(0)
        self._prompt = np.zeros(0, np.int32)

    def open(self, slot: int, req: Request) -> None:
        """Score the prompt."""
        if self.ranker is not None:
            self.scores[slot] = float(self.ranker.score([req.prompt])[0])

    def close(self, slot: int) -> None:
        """Forget the slot."""
        self.scores.pop(slot, None)

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """As ranked, by the scores that are there now."""
        self._refresh(view)
        self._prompt = view.table.prompt.copy()
        return super().plan(view, budget)

    def observe(self, facts: Facts) -> None:
        """Keep (score, length) of what finished, and measure tau now and then."""
        new = facts.new
        if not new.finish.any():
            return
        for i in np.flatnonzero(new.finish > 0).tolist():
            slot = int(new.slot[i])
            if slot < len(self._score):
                self._said.append((-float(self._score[slot]), said_by(facts, i, self._prompt)))
                self._news += 1
        if len(self._said) >= MEMORY and self._news >= MEMORY / 4:
            self._said, self._news = self._said[-MEMORY:], 0
            self.tau = kendall_tau(*(np.array(c, np.float64) for c in zip(*self._said)))

    def rank(self, view: EngineView, slots: Ints) -> Floats:
        """- score, in deviations of all known scores; the median for those that are not scored yet; arrival order if tau is too low."""
        if len(self._rank) < view.table.capacity:
            self._refresh(view)
        return self._rank[slots]

    def _refresh(self, view: EngineView) -> None:
        """Scores of new arrivals, and everybody's rank."""
        t = view.table
        self._grow(t.capacity)
        live = np.concatenate([view.ready, view.queue])
        fresh = live[self._whose[live] != t.seq[live]]
        if len(fresh):
            fresh = fresh[np.argsort(t.seq[fresh], kind="stable")]
            self._whose[fresh], self._score[fresh] = t.seq[fresh], self._raw(view, fresh)
            # One scorer works through arrivals in order.
            for slot in fresh.tolist():
                self._busy = max(self._busy, float(t.arrival[slot])) + self.cost
                self._through[slot] = self._busy
        elif self.noise is None and self.ranker is None:
            self._score[live] = t.score[live]  # annotations come at any time
        self._rank[:] = 0.0
        known = live[self._through[live] <= view.now] if self.cost else live
        if len(known) < 2 or (self.tau is not None and self.tau < self.least_tau):
            return
        scores = self._score[known]
        spread = float(scores.std())
        if spread > 0:
            self._rank[known] = (np.sort(scores)[len(scores) // 2] - scores) / spread

    def _raw(self, view: EngineView, slots: Ints) -> Floats:
        t = view.table
        if self.noise is not None:
            return -np.log(np.maximum(1, t.end[slots] - t.prompt[slots])) + self.noise * _normal(t.seq[slots])
        if self.ranker is None:
            return t.score[slots].astype(np.float64)
        return np.array([self.scores.get(s, float(t.score[s])) for s in slots.tolist()], np.float64)

    def _grow(self, capacity: int) -> None:
        more = capacity - len(self._whose)
        if more > 0:
            self._whose = np.r_[self._whose, np.full(more, -1, np.int64)]
            self._score, self._through, self._rank = (np.r_[c, np.zeros(more)] for c in (self._score, self._through, self._rank))


def _normal(keys: np.ndarray) -> Floats:
    """Standard normal numbers keyed by integers: SplitMix64 twice, then Box and Muller's transform."""
    with np.errstate(over="ignore"):
        a, b = (_mix(keys.astype(np.uint64) * np.uint64(2) + np.uint64(i)) for i in (1, 2))
    return np.sqrt(-2.0 * np.log(np.maximum(a, 1e-300))) * np.cos(2 * np.pi * b)


def _mix(z: np.ndarray) -> Floats:
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 9007199254740992.0
