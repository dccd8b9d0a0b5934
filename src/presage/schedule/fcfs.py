"""First come, first served: running requests first, then the queue in arrival order, stopping at the first that does not fit.

The unified token budget of vLLM V1: no phases, every request closes the gap between computed and known tokens. Decoding rows come before
chunks, so a long prompt never stalls those who already stream (Sarathi-Serve, arXiv 2403.02310). Other policies replace one of the
questions below: whom to serve first, whom to evict, who gives way, what must be free before somebody is let in.
"""

from __future__ import annotations

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Facts, Grants
from presage.core.protocols import EngineView
from presage.core.types import EMPTY, Ints, Longs, Why

Reasons = list[tuple[int, int, float]]
BURST = 1 << 16
"""Steps: as many as anybody wants to know of."""


class Fcfs:
    """The default policy, and the fallback when another one fails. ``trades``: whether somebody may be evicted for somebody who waits."""

    trades = False

    def __init__(self, config: SchedulerConfig | None = None) -> None:
        config = config or SchedulerConfig()
        self.chunked = config.enable_chunked_prefill
        self.threshold = config.long_prefill_token_threshold
        self.watermark = config.watermark

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """Grants for one step; see the module docstring for the order."""
        why: Reasons = []
        gone = self._give_way(view, why)
        held = view.ready[~np.isin(view.ready, gone)] if len(gone) else view.ready
        slots, tokens, drafts, evict = self._running(view, budget, held, why)
        grants = [slots], [tokens], [drafts]
        if not evict and len(view.queue):
            left = budget.tokens - int(tokens.sum())
            more = self._admit(view, left, min(budget.spans, view.max_num_seqs - view.running + len(gone)), why)
            if more:
                grants[0].append(np.array([m[0] for m in more], np.int32))
                grants[1].append(np.array([m[1] for m in more], np.int32))
                grants[2].append(np.zeros(len(more), np.int32))
        s, t, d = (np.concatenate(g) for g in grants)
        return Grants.of(s, t, view.layers, draft=d, evict=gone.tolist() + evict, why=why)

    def observe(self, facts: Facts) -> None:
        """Nothing is learnt."""

    def steady(self, view: EngineView) -> int:
        """The plan repeats while every running request decodes and nobody who waits could be let in. 1 in policies that learn from each step."""
        closed = not len(view.queue) or (view.running >= view.max_num_seqs and not self.trades)
        return BURST if closed else 1

    # ---- the questions

    def order(self, view: EngineView) -> Ints:
        """The queue in the order of service."""
        return view.queue

    def served(self, view: EngineView, slots: Ints) -> Ints:
        """Running slots in the order in which chunks get the budget: the first admitted."""
        return slots

    def victims(self, view: EngineView, slots: Ints) -> Ints:
        """Running slots, first to be evicted first: the last admitted."""
        return slots[::-1]

    def yields(self, view: EngineView) -> Ints:
        """Running slots that are evicted although memory would last: nobody."""
        return EMPTY

    def reserve(self, view: EngineView) -> Longs:
        """Blocks [POOLS] that stay free when somebody is let in."""
        share = self.watermark if view.running else 0.0
        return np.array([int(share * n) for n in view.pools], np.int64)

    # ---- the parts

    def _give_way(self, view: EngineView, why: Reasons) -> Ints:
        gone = self.yields(view)
        for slot in gone.tolist():
            why.append((slot, int(Why.EVICTED), float(view.computed[slot])))
            view.ledger.give(slot)
        return gone

    def _running(self, view: EngineView, budget: Budget, held: Ints, why: Reasons) -> tuple[Ints, Ints, Ints, list[int]]:
        """Slots, tokens, drafts and victims among ``held``, the running slots in order of admission."""
        slots = self.served(view, held)
        tokens = self._cut(view.gap[slots], budget.tokens)
        keep = tokens > 0
        slots, tokens = slots[keep], tokens[keep]
        drafts = view.table.ask[slots] if budget.drafts else np.zeros(len(slots), np.int32)
        if budget.drafts:
            drafts = np.clip(budget.drafts - (np.cumsum(drafts) - drafts), 0, drafts).astype(np.int32)
        need = view.ledger.need(slots, view.computed[slots] + tokens + drafts)
        if drafts.any() and np.any(need.sum(0) > view.ledger.free):
            # Nobody is evicted for a guess.
            drafts = np.zeros(len(slots), np.int32)
            need = view.ledger.need(slots, view.computed[slots] + tokens)
        evict: list[int] = []
        alive = np.ones(len(slots), bool)
        if not view.ledger.take(need.sum(0)):
            evict = self._make_room(view, held, slots, need, alive, why)
        return slots[alive], tokens[alive], drafts[alive], evict

    def _cut(self, gap: Ints, budget: int) -> Ints:
        """Tokens per running slot: decoding rows first, then chunks in order until the budget ends."""
        if self.threshold:
            gap = np.minimum(gap, self.threshold)
        if int(gap.sum()) <= budget:
            return gap
        decode = gap == 1
        left = max(0, budget - int(decode.sum()))
        chunk = np.where(decode, 0, gap)
        chunk = np.clip(left - (np.cumsum(chunk) - chunk), 0, chunk)
        ones = np.where(np.cumsum(decode) <= budget, decode, 0)
        return np.where(decode, ones, chunk).astype(np.int32)

    def _make_room(self, view: EngineView, held: Ints, slots: Ints, need: np.ndarray, alive: np.ndarray, why: Reasons) -> list[int]:
        """Evict until the rest fits. Someone is always kept: a lone request fits, or it was refused at arrival."""
        evict: list[int] = []
        place = {int(s): i for i, s in enumerate(slots)}
        for slot in self.victims(view, held).tolist():
            if len(evict) + 1 >= len(held):
                break
            evict.append(slot)
            why.append((slot, int(Why.EVICTED), float(view.computed[slot])))
            view.ledger.give(slot)
            if slot in place:
                alive[place[slot]] = False
            if view.ledger.take(need[alive].sum(0)):
                return evict
        # Only the oldest is left and its whole chunk does not fit: it runs alone later, once blocks in flight return.
        if not view.ledger.take(need[alive].sum(0)):
            alive[:] = False
        return evict

    def _admit(self, view: EngineView, left: int, seats: int, why: Reasons) -> list[tuple[int, int]]:
        out: list[tuple[int, int]] = []
        reserve = self.reserve(view)
        for slot in self.order(view).tolist():
            if left <= 0 or seats <= len(out):
                why.append((slot, int(Why.BUDGET if left <= 0 else Why.MAX_SEQS), float(left)))
                break
            gap = int(view.gap[slot])
            tokens = min(gap, left, self.threshold or gap)
            if not self.chunked and tokens < gap and out:
                why.append((slot, int(Why.BUDGET), float(left)))
                break
            start = int(view.computed[slot])
            # The whole prompt must fit, not just this chunk, or it would be evicted a step later.
            whole = view.ledger.whole(slot, start + gap)
            one = np.array([slot], np.int32)
            if np.any(whole + reserve > view.ledger.free) or not view.ledger.take(view.ledger.need(one, one * 0 + start + tokens)[0]):
                why.append((slot, int(Why.NO_BLOCKS), float(view.ledger.free.min())))
                break
            out.append((slot, tokens))
            left -= tokens
        return out
