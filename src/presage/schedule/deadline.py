"""Earliest deadline first, by the latest moment at which a request can still start and be in time (least slack).

HexGen-Text2SQL's urgency (arXiv 2505.05286): U = t - (budget - waited). All waiting requests age at one rate, so the order is the static key
latest start = deadline - t, where t is the time the request would take by itself. Its flaw is known: under overload those that are already
lost win and drag the others along; here who cannot be in time any more goes behind those who can. Stage budgets of a workflow: ``stage_budget``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Facts
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Floats, Ints
from presage.schedule.informed import Informed
from presage.schedule.pace import Pace, mixed
from presage.schedule.shortest import outputs_left

FAR = 1e9
"""Rank of requests without a deadline: behind all that have one; ``patience`` brings them forward."""
LOST = 1e12


class Deadline(Informed):
    """Rank = latest start. Deadlines are ``due_first`` and ``due_end`` of requests, which the engine enforces (who misses one is ended), and
    soft ones in ``Request.extras["due"]`` (seconds of the engine's clock), which only order.

    ``relegate``: who can no longer be in time goes last. ``margin``: slack in seconds by which a waiting request takes a running one's place.
    """

    def __init__(
        self, config: SchedulerConfig | None = None, relegate: bool = True, patience: float = 120.0, margin: float = math.inf
    ) -> None:  # fmt: skip
        super().__init__(config, patience, margin)
        self.relegate, self.pace = relegate, Pace()
        self.soft: dict[int, float] = {}

    def open(self, slot: int, req: Request) -> None:
        """Note a soft deadline."""
        if "due" in req.extras:
            self.soft[slot] = float(req.extras["due"])

    def close(self, slot: int) -> None:
        """Forget the slot."""
        self.soft.pop(slot, None)

    def observe(self, facts: Facts) -> None:
        """Learn step times; they are asked only if the engine has no latency model."""
        self.pace.observe(facts)

    def steady(self, view: EngineView) -> int:
        """As FCFS, unless every step teaches something."""
        return super().steady(view) if view.latency is not None else 1

    def rank(self, view: EngineView, slots: Ints) -> Floats:
        """Latest start, seconds; relegated and deadline-free requests behind."""
        start = self.latest_start(view, slots)
        rank = np.where(np.isfinite(start), start, FAR)
        return np.where(self.relegate & (start < view.now), LOST, rank)

    def latest_start(self, view: EngineView, slots: Ints) -> Floats:
        """When each must go on at the latest, if it then never waits; inf without a deadline."""
        t = view.table
        first, step = self._needs(view, slots)
        end = t.due_end[slots]
        if self.soft:
            end = np.minimum(end, np.array([self.soft.get(s, math.inf) for s in slots.tolist()]))
        whole = first + step * np.maximum(0.0, outputs_left(view, slots) - 1)
        before_first = np.where(t.out[slots] == 0, t.due_first[slots] - first, math.inf)
        return np.asarray(np.minimum(before_first, end - whole))

    def _needs(self, view: EngineView, slots: Ints) -> tuple[Floats, float]:
        """Seconds [n] to the next token beside those who decode now, and seconds of a decoding step."""
        if not self.pace.known(view):
            return np.zeros(len(slots)), 0.0
        decodes = view.ready[view.gap[view.ready] == 1]
        n, context = max(1, len(decodes)), float(view.known[decodes].sum())
        step = float(self.pace.seconds(view, mixed(n, context, 0.0))[0])
        gaps, back = np.unique(view.gap[slots], return_inverse=True)
        return self.pace.seconds(view, mixed(n, context, gaps))[back], step


def stage_budget(left: float, stage: str, remaining: Sequence[str], times: Mapping[str, float]) -> float:
    """Seconds of a query's ``left`` that its current stage gets: its share of the mean times of the stages that are still to come.

    ``times``: mean seconds of a stage over the cluster. A query that is late has nothing to divide: the budget is then negative and urgent.
    """
    whole = times[stage] + sum(times[s] for s in remaining)
    return left * times[stage] / whole if whole > 0 else left
