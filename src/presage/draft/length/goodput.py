"""SmartSpec (Liu et al., arXiv 2406.14066): one draft length for the batch, the one with most expected tokens per predicted second.

Unlike the published forks: acceptance by position instead of one rate, every length is tried instead of stopping at the first decrease (step
time has steps), the time model is learnt online, and length 0 asks the drafter for nothing.
"""

from __future__ import annotations

import numpy as np

from presage.core.plan import Draft, Facts, Grants, Keep
from presage.core.protocols import EngineView, LatencyModel
from presage.core.types import Floats, Ints
from presage.draft.length.learner import Learner, padded
from presage.draft.length.levels import best_level, chain_depths, level_curve
from presage.draft.length.ready import affordable, within
from presage.draft.length.scan import Batch
from presage.draft.length.wishes import Wishes


class Goodput:
    """``num_speculative_tokens`` is the longest draft. Every ``explore_every`` steps the full length is proposed and verified, so that the
    acceptance of far positions stays known and a server that stopped drafting notices when drafting pays again.

    ``per_request``: keep the batch's total but give more to requests that accept more (the paper's beta rule). ``latency``: a model of
    one's own instead of the learnt one.
    """

    def __init__(
        self,
        num_speculative_tokens: int = 16,
        per_request: bool = False,
        explore_every: int = 200,
        latency: LatencyModel | None = None,
        rule: str = "keyed",
    ) -> None:
        self.k, self.per_request, self.explore_every = num_speculative_tokens, per_request, max(1, explore_every)
        self.learner = Learner(Wishes(rule), latency)
        self.length = num_speculative_tokens
        self._explored = -1

    @property
    def wishes(self) -> Wishes:
        """The companion that notes requests' overrides."""
        return self.learner.wishes

    def ask(self, view: EngineView, hint: Ints) -> Ints:
        """[C] nodes worth drafting for each slot."""
        out = np.zeros(len(hint), np.int32)
        slots, length, _ = self.learner.ready(view, hint)
        if not len(slots):
            return out
        length = np.minimum(length, self.k)
        if view.step // self.explore_every == self._explored:
            length = self._lengths(view, slots, length)
        out[slots] = length
        return affordable(view, out)

    def select(self, view: EngineView, grants: Grants, draft: Draft) -> Keep:
        """Drafts cut below the depth that is best for what was really drafted."""
        keep, hold = within(grants, draft), np.zeros(len(grants), np.bool_)
        if not len(draft):
            return Keep(keep, hold)
        self.learner.fit(view.table.capacity)
        turn = view.step // self.explore_every
        if turn != self._explored:
            self._explored = turn
            return Keep(keep, hold)
        batch = self.learner.planned(view, grants, draft)
        counts = np.diff(draft.offset)
        deepest = np.zeros(len(grants), np.int32)
        owner = np.repeat(np.arange(len(grants)), counts)
        np.maximum.at(deepest, owner, draft.depth)
        at, path = self.learner.positions.curves(grants.slot, deepest)
        tokens, seconds = level_curve(batch, draft.offset, draft.depth, at, path, self.learner.latency(view))
        requests = int(np.count_nonzero(grants.draft))
        self.length = best_level(tokens, seconds, self.learner.overhead.seconds(requests, int(grants.draft.max())))
        cut = self._shares(grants.slot, deepest) if self.per_request else np.full(len(grants), self.length, np.int32)
        return Keep(keep & ((draft.depth <= np.repeat(cut, counts)) | batch.whole[owner]), hold)

    def observe(self, facts: Facts) -> None:
        """One finished step."""
        self.learner.observe(facts)

    def _lengths(self, view: EngineView, slots: Ints, length: Ints) -> Ints:
        """Lengths before anything is drafted. Cheap drafters are asked for all and cut afterwards, unless nothing is the best length."""
        learner = self.learner
        batch: Batch = learner.batch(slots, view, length)
        offset, depth = chain_depths(length)
        at, path = learner.positions.curves(slots, length)
        n = len(batch.start) + 1
        tokens, seconds = level_curve(batch, padded(offset, n, offset[-1]), depth, padded(at, n, at[-1]), path, learner.latency(view))
        extra: Floats = np.array([learner.overhead.seconds(len(slots) if k else 0, k) for k in range(len(tokens))])
        self.length = best_level(tokens, seconds, extra)
        if not self.length:
            return np.zeros_like(length)
        cheap = learner.overhead.per_level * (len(tokens) - 1) < 0.01 * seconds[0]
        short = np.minimum(length, self._shares(slots, length) if self.per_request else self.length)
        return np.asarray(np.where(learner.wishes.bound[slots] | (not cheap), short, length), np.int32)

    def _shares(self, slots: Ints, length: Ints) -> Ints:
        """The batch's length spread over its requests in proportion to their acceptance (the sheet's section 5)."""
        if not self.length or not len(slots):
            return np.zeros(len(slots), np.int32)
        _, alpha = self.learner.positions.curves(slots, np.ones(len(slots), np.int32))
        beta = (self.length - 1) * len(slots) / max(float(alpha.sum()), 1e-9)
        return np.minimum(np.rint(beta * alpha).astype(np.int32) + 1, np.maximum(length, 0))
