"""What adaptive policies learn in common: step time, drafting overhead, acceptance by position, and which slot holds which request."""

from __future__ import annotations

import numpy as np

from presage.core.plan import Draft, Facts, Grants
from presage.core.protocols import EngineView, LatencyModel
from presage.core.types import Ints
from presage.draft.length.overhead import Overhead
from presage.draft.length.positions import Positions
from presage.draft.length.ready import decoding
from presage.draft.length.scan import Batch
from presage.draft.length.steptime import StepTime
from presage.draft.length.wishes import Wishes

FADE_EVERY = 16
COUNTS = 1025


def padded(values: Ints, n: int, fill: int) -> Ints:
    """``values`` followed by ``fill`` up to length ``n``."""
    return np.concatenate([values, np.full(n - len(values), fill, np.int32)]) if len(values) < n else values


class Learner:
    """Plain data, picklable. The engine's own latency model is used where the view has one; otherwise ``steptime`` learns here."""

    def __init__(self, wishes: Wishes, latency: LatencyModel | None = None) -> None:
        self.wishes, self.positions, self.overhead = wishes, Positions(), Overhead()
        self.steptime: LatencyModel = latency if latency is not None else StepTime()
        self._shared = False
        self.visits = np.zeros(COUNTS)
        self._seq = np.full(0, -1, np.int64)
        self.observed = 0

    def ready(self, view: EngineView, hint: Ints) -> tuple[Ints, Ints, Ints]:
        """(slots that may draft, nodes each may have, those slots that hold a new request)."""
        self._shared = view.latency is not None
        self.fit(len(hint))
        slots = decoding(view, hint)
        length = np.minimum(hint[slots], self.wishes.cap[slots])
        slots, length = slots[length > 0], length[length > 0]
        seq = view.table.seq[slots]
        fresh = slots[self._seq[slots] != seq]
        if len(fresh):
            self._seq[slots] = seq
            self.positions.reset(fresh)
        return slots, length, fresh

    def fit(self, capacity: int) -> None:
        """Make room for slots below ``capacity``."""
        if capacity > len(self._seq):
            self._seq = np.concatenate([self._seq, np.full(capacity - len(self._seq), -1, np.int64)])
            self.wishes.fit(capacity)
            self.positions.fit(capacity)

    def latency(self, view: EngineView) -> LatencyModel:
        """The model to predict with."""
        return self.steptime if view.latency is None else view.latency

    def batch(self, slots: Ints, view: EngineView, cap: Ints) -> Batch:
        """The step before there is a plan: ``slots`` first, as decoding rows, then the other decoding requests, which draft nothing."""
        rest = view.ready[view.gap[view.ready] == 1]
        if len(rest) > len(slots):
            mine = np.zeros(len(view.gap), np.bool_)
            mine[slots] = True
            slots = np.concatenate([slots, rest[~mine[rest]]])
            cap = padded(cap, len(slots), 0)
        n = len(slots)
        return Batch(view.computed[slots], np.ones(n, np.int32), np.ones(n, np.bool_), cap, np.zeros(n, np.bool_), self._targets(slots))

    def planned(self, view: EngineView, grants: Grants, draft: Draft) -> Batch:
        """The spans of a plan. Under a rejection rule, spans with sampled nodes are ``whole``: what was drawn must not decide what is judged."""
        slot = grants.slot
        start = np.where(grants.start < 0, view.computed[slot], grants.start).astype(np.int32)
        layers = grants.layer1 - grants.layer0
        share = 1.0
        if int(layers.min()) < view.layers:
            share = float(layers @ grants.tokens) / (view.layers * max(int(grants.tokens.sum()), 1))
        samples = (grants.tokens >= view.gap[slot]) & (grants.layer1 == view.layers)
        return Batch(start, grants.tokens, samples, grants.draft, self._whole(grants, draft), self._targets(slot), share)

    def observe(self, facts: Facts) -> bool:
        """One finished step; True when it is time to let old knowledge fade."""
        self.overhead.observe(facts)
        if not self._shared:
            self.steptime.observe(facts)
        self.positions.observe(facts)
        self.observed += 1
        self.visits[min(int(facts.plan.features[0]), COUNTS - 1)] += 1.0
        fading = self.observed % FADE_EVERY == 0
        if fading:
            self.positions.fade()
            self.visits *= 1.0 - FADE_EVERY / 2048
        return fading

    def _whole(self, grants: Grants, draft: Draft) -> np.ndarray:
        bound = self.wishes.bound[grants.slot]
        if not bound.any() or not (draft.trial_q >= 0).any():
            return np.zeros(len(grants), np.bool_)
        # Trials in draw order point at nodes; a span with one sampled trial is judged as it was asked for, point masses included.
        nodes = draft.trial_node[draft.trial_q >= 0]
        sampled = np.zeros(len(grants), np.bool_)
        sampled[np.searchsorted(draft.offset, nodes, side="right") - 1] = True
        return bound & sampled

    def _targets(self, slots: Ints) -> np.ndarray | None:
        return self.wishes.each[slots] if self.wishes.targets else None
