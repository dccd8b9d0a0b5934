"""Sarathi-Serve (arXiv 2403.02310): stall-free batches whose token budget is the largest that keeps the time between tokens.

Decoding rows go first and are never refused; what is left of the budget goes to chunks of prompts already begun, then to new ones. The
budget is a prediction, not a constant: the largest multiple of ``tile`` rows whose step stays within ``tbt`` seconds beside the rows that
decode now, with the contexts they have now. Nobody decodes: there is nothing to stall, and the whole budget is used.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Facts, Grants
from presage.core.protocols import EngineView
from presage.core.types import Ints
from presage.schedule.fcfs import Fcfs
from presage.schedule.pace import Pace, mixed

STRICT = (32.0, 4096.0, 5.0)
"""The paper's strict objective without a number: five times a step of 32 decoding requests with 4k tokens of context."""


class Sarathi(Fcfs):
    """FCFS under a budget from the objective. ``tbt``: seconds between tokens, None = the paper's strict one. ``safety``: predictions times this.

    ``tile``: rows of a matrix tile (a budget one row over wastes a whole tile row), ``floor``: tokens of prompts a step carries at least, or
    prompts would starve when decoding rows alone are too slow.
    """

    def __init__(
        self, config: SchedulerConfig | None = None, tbt: float | None = None, tile: int = 16, floor: int = 16, safety: float = 1.1
    ) -> None:  # fmt: skip
        super().__init__(config)
        if min(tile, floor) < 1 or safety <= 0 or (tbt is not None and tbt <= 0):
            raise ValueError("tile and floor must be at least 1, tbt and safety above 0")
        self.tbt, self.tile, self.floor, self.safety = tbt, tile, floor, safety
        self.pace = Pace()

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """FCFS with the budget of this step's composition."""
        return super().plan(view, replace(budget, tokens=self.tokens(view, budget)))

    def observe(self, facts: Facts) -> None:
        """Learn step times; they are asked only if the engine has no latency model."""
        self.pace.observe(facts)

    def steady(self, view: EngineView) -> int:
        """As FCFS, unless every step teaches something."""
        return super().steady(view) if view.latency is not None else 1

    def tokens(self, view: EngineView, budget: Budget) -> int:
        """Rows of the step: known tokens that decode, and of prompts."""
        decodes = view.ready[view.gap[view.ready] == 1]
        start = self._chunk_start(view)
        if not len(decodes) or start is None or not self.pace.known(view):
            return budget.tokens
        n, guesses = len(decodes), int(view.table.ask[decodes].sum()) if budget.drafts else 0
        totals = np.arange(-(-(n + 1) // self.tile), budget.tokens // self.tile + 1) * self.tile
        if len(totals) > 64:
            # A coarser ladder of tiles: one prediction of 64 rows costs no more than one of 8.
            totals = totals[np.unique(np.linspace(0, len(totals) - 1, 64).astype(np.int64))]
        least = min(budget.tokens, n + self.floor)
        if not len(totals):
            return least
        took = self.pace.seconds(view, mixed(n + guesses, float(view.known[decodes].sum()) + guesses, totals - n, start))
        fits = np.flatnonzero(took * self.safety <= self.slo(view))
        return max(least, int(totals[fits[-1]])) if len(fits) else least

    def slo(self, view: EngineView) -> float:
        """Seconds a step may take."""
        if self.tbt is not None:
            return self.tbt
        rows, context, times = STRICT
        return float(times * self.pace.seconds(view, mixed(rows, rows * context, 0.0))[0])

    def _chunk_start(self, view: EngineView) -> int | None:
        """Where the first prompt that would get a chunk goes on; None if no prompt waits."""
        begun: Ints = view.ready[view.gap[view.ready] > 1]
        first = begun if len(begun) else view.queue
        return int(view.computed[first[0]]) if len(first) else None
