"""NanoFlow's batches (arXiv 2408.12757): a constant dense batch, cut into nano-batches whose operations may overlap.

Every step is filled to exactly ``dense`` rows (decoding rows, then chunks cut to fit), so that one searched overlap plan is valid at every
step; requests are let in while the predicted peak of their KV fits. ``Grants.splits`` holds the row boundaries: a GEMM of one range may run
beside the attention of another and a collective of a third. What that is worth is ``overlap``'s question; below ``least`` rows nothing is cut,
because weights are read once per range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Grants
from presage.core.protocols import EngineView
from presage.core.types import EMPTY, Ints
from presage.schedule.budget import KVForecast


class Splits(KVForecast):
    """``dense``: rows of a step (0 = the engine's budget). ``at``: shares of the rows at which they are cut, rounded to ``tile`` rows."""

    def __init__(
        self, config: SchedulerConfig | None = None, dense: int = 0, at: Sequence[float] = (0.375,), tile: int = 128, least: int = 512
    ) -> None:  # fmt: skip
        super().__init__(config, draft_until=1 << 30)
        if dense < 0 or tile < 1 or least < 2 or not all(0 < a < b for a, b in zip(at, [*at[1:], 1.0])):
            raise ValueError("dense must not be negative, tile at least 1, least at least 2, and at must rise between 0 and 1")
        self.dense, self.at, self.tile, self.least = dense, tuple(at), tile, least

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """FCFS up to the dense batch, with the boundaries of its nano-batches."""
        grants = super().plan(view, replace(budget, tokens=min(budget.tokens, self.dense or budget.tokens)))
        grants.splits = self.boundaries(int(grants.tokens.sum()))
        return grants

    def boundaries(self, rows: int) -> Ints:
        """Row numbers at which a step of ``rows`` rows is cut; none if it is too small to gain."""
        if rows < self.least:
            return EMPTY
        cuts = np.unique(np.round(np.array(self.at) * rows / self.tile).astype(np.int32) * self.tile)
        return np.asarray(cuts[(cuts > 0) & (cuts < rows)], np.int32)
