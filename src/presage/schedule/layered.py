"""Layered prefill (arXiv 2510.08055): a wave of prompts passes a group of layers per step while decoding rows run the whole stack.

Each step carries whole prompts through N/G layers instead of chunks through all layers, so a mixture-of-experts model reads each expert
once per prompt instead of once per chunk. G grows with the wave, so that a stage costs what a chunk of ``work`` tokens would. Prompts of at
most ``short`` tokens pass all layers at once, and a new wave starts while others climb, as long as the stages together stay within the
step's budget: there is no barrier between waves. Rectangles of the staircase rule; the executor keeps the activations between steps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Grants
from presage.core.protocols import EngineView
from presage.core.types import Longs, Why
from presage.schedule.fcfs import Fcfs, Reasons

Rectangle = tuple[int, int, int, int, int]
"""slot, start, tokens, first layer, layer above the last."""


class Layered(Fcfs):
    """FCFS admission. ``work``: tokens x share of layers a stage may cost, ``wave``: tokens of a wave at most, ``groups``: layer groups at most."""

    def __init__(self, config: SchedulerConfig | None = None, work: int = 512, wave: int = 8192, groups: int = 16, short: int = 64) -> None:
        super().__init__(config)
        if min(work, wave, groups) < 1 or short < 0:
            raise ValueError("work, wave and groups must be at least 1, short not negative")
        self.work, self.wave, self.groups, self.short = work, wave, groups, short

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """Decoding rows and short rests through all layers; then the next stage of each wave; then a new wave from rests and queue."""
        t, ready = view.table, view.ready
        climbing = np.isin(ready, list(t.fronts)) if t.fronts else np.zeros(len(ready), bool)
        if t.inflight.any() and (t.fronts or (view.gap[ready] > 1).any()):
            # Where a rectangle in flight will stand is known when it settled; an empty plan is made anew then.
            return Grants.of([], [], view.layers)
        why: Reasons = []
        decoding, rests = ready[~climbing & (view.gap[ready] == 1)], ready[~climbing & (view.gap[ready] > 1)]
        # A wave was let in at a price that fits by itself, so it is never held back; rows that decode get all but that.
        stages = self._climb(view, ready[climbing].tolist(), float(budget.tokens - len(decoding)))
        spent = sum(n * (q - p) / view.layers for _, _, n, p, q in stages)
        slots, tokens, drafts, evict = self._running(view, replace(budget, tokens=int(budget.tokens - spent)), decoding, why)
        if not evict:
            left, seats = budget.tokens - spent - int(tokens.sum()), min(budget.spans, view.max_num_seqs - view.running)
            stages += self._start(view, left, rests.tolist(), seats, why)
        return _join(Grants.of(slots, tokens, view.layers, draft=drafts, evict=evict, why=why), stages, view.layers)

    def width(self, tokens: int, layers: int, left: float) -> int:
        """Layers of one group: ceil(tokens / work) groups, rounded up to a power of two, as even as the depth allows; fewer if ``left``
        tokens x share of layers do not suffice."""
        groups = 1 << max(0, (-(-tokens // self.work) - 1).bit_length())
        even = -(-layers // min(groups, self.groups, layers))
        return max(1, min(even, int(left * layers / max(1, tokens))))

    def _climb(self, view: EngineView, slots: list[int], left: float) -> list[Rectangle]:
        """The next stage of every open rectangle; those that stand at the same layer are one wave and share its groups."""
        fronts = {s: view.table.fronts[s][0] for s in slots}
        total: dict[int, int] = {}
        for slot, (end, done) in fronts.items():
            total[done] = total.get(done, 0) + end - int(view.computed[slot])
        out, width = [], dict[int, int]()
        # The furthest first: it is the nearest to its first token.
        for done in sorted(total, reverse=True):
            width[done] = min(view.layers - done, self.width(total[done], view.layers, left))
            left -= total[done] * width[done] / view.layers
        for slot, (end, done) in fronts.items():
            start = int(view.computed[slot])
            out.append((slot, start, end - start, done, done + width[done]))
        return out

    def _start(self, view: EngineView, left: float, rests: list[int], seats: int, why: Reasons) -> list[Rectangle]:
        """A new wave: prompts in order while blocks, seats and the price of a stage allow. Short ones pass all layers beside it."""
        reserve, size, layers = self.reserve(view), 0, view.layers
        deep = min(self.groups, layers)
        wave: list[tuple[int, int, int]] = []
        out: list[Rectangle] = []
        for slot in rests + self.order(view).tolist():
            queued, start = slot not in rests, int(view.computed[slot])
            n = min(int(view.gap[slot]), self._most(view, slot, start, left))
            short = n <= max(1, self.short)
            n = min(n, max(1, int(left))) if short else n
            # What a stage costs at least, if the wave becomes as deep as it may; beside it, short ones cost all their tokens.
            least = n + size / deep if short else (size + n) / deep
            reason = Why.MAX_SEQS if queued and seats <= 0 else None
            if left < 1 or ((size or out) and (least > left or size + n > self.wave)):
                reason = Why.BUDGET
            elif reason is None and not self._takes(view, slot, start, n, queued, reserve):
                reason = Why.NO_BLOCKS
            if reason is not None:
                why.append((slot, int(reason), left))
                break
            seats -= queued
            if short:
                out.append((slot, start, n, 0, layers))
                left -= n
            else:
                wave.append((slot, start, n))
                size += n
        top = self.width(size, layers, left)
        return out + [(slot, start, n, 0, top) for slot, start, n in wave]

    def _takes(self, view: EngineView, slot: int, start: int, n: int, queued: bool, reserve: Longs) -> bool:
        """Take the rectangle's blocks, of all layers at once, so that no later stage can fail."""
        whole, one = view.ledger.whole(slot, start + int(view.gap[slot])), np.array([slot], np.int32)
        if queued and np.any(whole + reserve > view.ledger.free):
            return False
        return view.ledger.take(view.ledger.need(one, one * 0 + start + n)[0])

    def _most(self, view: EngineView, slot: int, start: int, left: float) -> int:
        """Tokens of one rectangle: what the groups make of the budget. Window groups count on chunks, or old blocks would not be freed."""
        one = np.array([slot], np.int32)
        far = start + max(int(view.gap[slot]), 1)
        bounded = bool((view.ledger.whole(slot, far) < view.ledger.need(one, one * 0 + far)[0]).any())
        groups = 1 if bounded else min(self.groups, view.layers)
        return max(1, min(self.wave, int(left) * groups))


def _join(grants: Grants, stages: list[Rectangle], layers: int) -> Grants:
    if stages:
        slot, start, tokens, p, q = (np.array(c, np.int32) for c in zip(*stages))
        whole = (p == 0) & (q == layers)
        grants.slot, grants.tokens = np.concatenate([grants.slot, slot]), np.concatenate([grants.tokens, tokens])
        # A whole stack starts at the frontier as any grant does, and is counted against the budget.
        grants.start = np.concatenate([grants.start, np.where(whole, -1, start).astype(np.int32)])
        grants.layer0, grants.layer1 = np.concatenate([grants.layer0, p]), np.concatenate([grants.layer1, q])
        n = len(slot)
        grants.draft = np.concatenate([grants.draft, np.zeros(n, np.int32)])
        grants.lane = np.concatenate([grants.lane, np.zeros(n, np.uint8)])
    return grants
