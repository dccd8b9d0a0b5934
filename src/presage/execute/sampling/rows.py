"""Target rows of a step, made when a rule asks for them: a rejected branch costs neither penalties nor a softmax."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.core.plan import StepPlan
from presage.core.types import Floats, Ints, Longs, Singles
from presage.execute.sampling.noise import EMPTY_ROW, Noise, block_peaks, draw_rows
from presage.execute.sampling.state import SamplingState, Touch
from presage.execute.sampling.steps import Group, Step, inverse_temperature
from presage.execute.sampling.vecmath import BLOCK

_ALTERING = ~int(Touch.TEMPERATURE)  # a draw scales by the temperature itself; any other wish needs an altered copy of the row
_NAN = "its logits contain NaN or +inf"
_EMPTY = "its sampling restrictions (grammar, allowed ids, bad words, bias) leave no token to choose"


@njit("void(f4[:,::1],i8[::1],f4[:,::1],i4[::1])", cache=True, nogil=True)
def _copy_rows(logits: Any, rows: Any, z: Any, state: Any) -> None:
    """Rows of ``logits`` into ``z``; ``state`` 1 where a row has NaN or +inf. Such a row becomes 0, so that no step trips over it."""
    peaks = np.empty((logits.shape[1] + BLOCK - 1) // BLOCK, np.int32)
    for j in range(len(rows)):
        row = logits[rows[j]]
        _, _, bad = block_peaks(row, peaks)
        state[j] = 1 if bad else 0
        for i in range(len(row)):
            z[j, i] = np.float32(0) if bad else row[i]


class Rows:
    """Lazily modified target rows, named by (span, node); node -1 is the span's last known token.

    ``spans``: spans to decide, ascending. ``slot`` [S], ``base`` int64 [S]: index of the token decided after the last known one.
    ``failed``: span -> why nothing can be drawn for it. Results for failed spans are -1 and must be dropped.
    """

    def __init__(
        self, logits: Singles, plan: StepPlan, where: tuple[Ints, Ints], state: SamplingState, steps: tuple[Step, ...], masks: Any
    ) -> None:
        self.logits, self.plan, self._state, self._steps = logits, plan, state, steps
        row_span, row_node = where
        self.slot = plan.slot
        self.base = (plan.start + plan.count).astype(np.int64)
        self.failed: dict[int, str] = {}
        nodes = len(plan.draft)
        # One place per (span, node), the span's own row first.
        self._first = (plan.draft.offset[:-1] if nodes else np.zeros(plan.spans, np.int32)) + np.arange(plan.spans) + 1
        self._row = np.full(plan.spans + nodes, -1, np.int64)
        self._row[self._first[row_span] + row_node] = np.arange(len(row_span))
        self.spans = np.flatnonzero(self._row[self._first - 1] >= 0).astype(np.int32)
        self._mask = np.full(len(logits), -1, np.int32)
        self._bits: np.ndarray | None = None
        if masks is not None and len(masks[0]):
            self._mask[np.asarray(masks[0])] = np.arange(len(masks[0]))
            self._bits = np.ascontiguousarray(masks[1], np.int32)

    def index(self, spans: Ints, nodes: Ints) -> Longs:
        """Rows [n] of ``logits``."""
        return self._row[self._first[spans] + nodes]

    def depth(self, spans: Ints, nodes: Ints) -> Ints:
        """Drafted tokens before the one each row decides [n]: 0 for node -1."""
        if not len(self.plan.draft):
            return np.zeros(len(spans), np.int32)
        return np.where(nodes < 0, 0, self.plan.draft.depth[self._flat(spans, nodes)]).astype(np.int32)

    def path(self, span: int, node: int) -> list[int]:
        """Tokens from the root to ``node``, itself included."""
        draft, tokens = self.plan.draft, []
        first = int(draft.offset[span]) if node >= 0 else 0
        while node >= 0:
            tokens.append(int(draft.token[first + node]))
            node = int(draft.parent[first + node])
        return tokens[::-1]

    def sampled(self, spans: Ints) -> np.ndarray:
        """Mask [n] of the spans whose request is not greedy."""
        return self._state.temperature[self.slot[spans]] > 0

    def draw(self, spans: Ints, nodes: Ints, noise: Noise) -> Ints:
        """One id per (span, node) [n]: the target's argmax at temperature 0, else a draw by keyed Gumbel noise. -1 for failed spans."""
        rows, depth, slots = self.index(spans, nodes), self.depth(spans, nodes), self.slot[spans]
        keys, greedy = noise.keys(spans, depth), ~self.sampled(spans)
        scale, out = inverse_temperature(self._state, slots), np.empty(len(spans), np.int32)
        direct = ((self._state.wants[slots] & _ALTERING) == 0) & (self._mask[rows] < 0)
        if direct.all():
            draw_rows(self.logits, rows, greedy, scale, keys, out)
        else:
            self._draw(direct, (rows, greedy, scale, keys), out)
            j = np.flatnonzero(~direct)
            z = self.modified(spans[j], nodes[j])
            part = np.empty(len(j), np.int32)
            draw_rows(z, np.arange(len(j)), greedy[j], np.ones(len(j), np.float32), keys[j], part)
            out[j] = part
        return self._report(spans, out)

    def modified(self, spans: Ints, nodes: Ints) -> Singles:
        """Target logits [n, V] after every step, -inf outside the support; scale and support are those of the draw."""
        rows = self.index(spans, nodes)
        z, bad = np.empty((len(rows), self.logits.shape[1]), np.float32), np.empty(len(rows), np.int32)
        _copy_rows(self.logits, rows, z, bad)
        for j in bad.nonzero()[0].tolist():
            self.failed.setdefault(int(spans[j]), _NAN)
        slots = self.slot[spans]
        out = self.base[spans] + self.depth(spans, nodes) - self._state.n_prompt[slots]
        group = Group(slots, out, self._mask[rows], self._bits, lambda j: self.path(int(spans[j]), int(nodes[j])))
        asked = int(np.bitwise_or.reduce(self._state.wants[slots], initial=0))
        for step in self._steps:
            if step.bit and not step.bit & asked:
                continue
            which = step.applies(self._state, group).nonzero()[0]
            if len(which):
                step.apply(z, which, self._state, group)
        return z

    def probs(self, spans: Ints, nodes: Ints) -> Floats:
        """Target probabilities float64 [n, V]: one-hot at the argmax for greedy requests. Rows of failed spans are 0."""
        z = self.modified(spans, nodes)
        top = z.max(axis=1)
        for j in np.flatnonzero(~np.isfinite(top)).tolist():
            self.failed.setdefault(int(spans[j]), _EMPTY)
        p = np.exp(z.astype(np.float64) - np.where(np.isfinite(top), top, 0.0)[:, None])
        for j in np.flatnonzero(~self.sampled(spans)).tolist():
            best = int(np.argmax(z[j]))
            p[j] = 0.0
            p[j, best] = 1.0
        p[np.isin(spans, list(self.failed))] = 0.0
        return p / np.maximum(p.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)

    def _draw(self, some: np.ndarray, parts: tuple[Any, ...], out: Ints) -> None:
        j = np.flatnonzero(some)
        if len(j):
            rows, greedy, scale, keys = (a[j] for a in parts)
            part = np.empty(len(j), np.int32)
            draw_rows(self.logits, rows, greedy, scale, keys, part)
            out[j] = part

    def _flat(self, spans: Ints, nodes: Ints) -> Longs:
        return np.maximum(self._first[spans] - spans - 1 + nodes, 0)

    def _report(self, spans: Ints, out: Ints) -> Ints:
        if out.min(initial=0) < 0:
            for j in np.flatnonzero(out < 0).tolist():
                self.failed.setdefault(int(spans[j]), _EMPTY if out[j] == EMPTY_ROW else _NAN)
        if self.failed:
            out[np.isin(spans, list(self.failed))] = -1
        return out
