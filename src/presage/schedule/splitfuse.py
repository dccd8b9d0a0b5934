"""Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671): every pass has the same number of tokens, just inside the throughput plateau.

Long prompts are split over passes, short ones composed, and the last one is cut so that the pass is exactly ``target`` tokens. Throughput is
concave in the size of a pass, so equal passes are best. A prompt is let in only if its whole rest finds blocks beside what was promised to
those before it; continuations that lack a block wait; only when nothing at all can run does the youngest lose its KV.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Grants
from presage.core.protocols import EngineView
from presage.core.types import Ints, Longs, Why
from presage.schedule.fcfs import Fcfs, Reasons


class SplitFuse(Fcfs):
    """FCFS order; ``target``: tokens of a pass (the published engine's 768), at most the engine's budget."""

    def __init__(self, config: SchedulerConfig | None = None, target: int = 768) -> None:
        super().__init__(config)
        if target < 1:
            raise ValueError("target must be at least 1 token")
        self.target, self.chunked, self.threshold = target, True, 0

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """One pass of at most ``target`` tokens."""
        return super().plan(view, replace(budget, tokens=min(budget.tokens, self.target)))

    def reserve(self, view: EngineView) -> Longs:
        """Blocks that prompts which are part way will still need: they were promised when these were let in."""
        begun = view.ready[view.gap[view.ready] > 1]
        return view.ledger.need(begun, view.known[begun]).sum(0)

    def _make_room(self, view: EngineView, held: Ints, slots: Ints, need: np.ndarray, alive: np.ndarray, why: Reasons) -> list[int]:
        """Rows that find no block wait a pass; if that is all of them, the youngest are flushed."""
        for i in range(len(slots)):
            alive[i] = view.ledger.take(need[i])
            if not alive[i]:
                why.append((int(slots[i]), int(Why.NO_BLOCKS), float(view.ledger.free.min())))
        if alive.any() or view.table.inflight[view.ready].any():
            return []
        alive[:] = True
        return super()._make_room(view, held, slots, need, alive, why)
