"""Layered prefill (arXiv 2510.08055): a wave of prompts passes a group of layers per step while decoding rows run the whole stack.

Each step carries whole prompts through N/G layers instead of chunks through all layers, so a mixture-of-experts model reads each expert
once per prompt instead of once per chunk. Rectangles of the staircase rule; the executor keeps the activations between steps.
"""

from __future__ import annotations

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Grants
from presage.core.protocols import EngineView
from presage.schedule.fcfs import Fcfs


class Layered(Fcfs):
    """FCFS admission; prompts longer than ``threshold`` tokens advance ``layers / groups`` layers a step."""

    def __init__(self, config: SchedulerConfig | None = None, groups: int = 4, threshold: int = 64) -> None:
        super().__init__(config)
        self.groups, self.wave = groups, threshold

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """Whole-stack grants as FCFS makes them, then long chunks are narrowed to the next layer group of their rectangle."""
        grants = super().plan(view, budget)
        width = -(-view.layers // self.groups)
        for i, slot in enumerate(grants.slot.tolist()):
            fronts = view.table.fronts.get(slot)
            if fronts:
                end, done = fronts[0]
                start = int(view.computed[slot])
                grants.start[i], grants.tokens[i] = start, end - start
                grants.layer0[i], grants.layer1[i] = done, min(view.layers, done + width)
            elif grants.tokens[i] > self.wave:
                grants.layer1[i] = min(view.layers, width)
        return grants
