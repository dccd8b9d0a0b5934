"""Shortest job first, by what a request still has to compute; preemptive with a finite ``margin`` (shortest remaining time first).

Mean latency is least when short work goes first, if lengths are known (Schrage 1968). Output lengths are what somebody annotated (the column
``score``: predicted output tokens), else what the request may say at most. Ageing is in the order itself: a second of arrival earlier counts
like ``ageing`` tokens less, so a request is overtaken only by those that come within work / ``ageing`` seconds after it.
"""

from __future__ import annotations

import math

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.protocols import EngineView
from presage.core.types import Floats, Ints
from presage.schedule.ranked import Ranked

BY = ("work", "output", "prompt")


class Shortest(Ranked):
    """Rank = tokens of work - ``ageing`` x seconds waited. ``by``: what work is: prompt rest x ``prompt_weight`` + outputs, or one of the two.

    ``margin``: tokens by which a waiting request must be shorter to take a running one's place; inf = never.
    """

    def __init__(
        self, config: SchedulerConfig | None = None, by: str = "work", ageing: float = 10.0, prompt_weight: float = 0.1,
        patience: float = 60.0, margin: float = math.inf,
    ) -> None:  # fmt: skip
        super().__init__(config, patience, margin)
        if by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, not {by!r}")
        self.by, self.ageing, self.prompt_weight = by, ageing, prompt_weight

    def rank(self, view: EngineView, slots: Ints) -> Floats:
        """Work in tokens, less what ageing gives."""
        return self.work(view, slots) - self.ageing * (view.now - view.table.arrival[slots])

    def work(self, view: EngineView, slots: Ints) -> Floats:
        """Tokens still to compute; prompt tokens cost less than output tokens, each of which costs a step."""
        prompt = np.maximum(0, view.gap[slots] - (view.table.out[slots] > 0)).astype(np.float64)
        if self.by == "prompt":
            return prompt
        return outputs_left(view, slots) + (self.prompt_weight * prompt if self.by == "work" else 0.0)


def outputs_left(view: EngineView, slots: Ints) -> Floats:
    """Output tokens still to come: predicted (``score``) less those said, at least one; or what the limit leaves."""
    t = view.table
    predicted = t.score[slots]
    left = (t.end[slots] - view.known[slots]).astype(np.float64)
    return np.where(predicted > 0, np.clip(predicted - t.out[slots], 1.0, left), left)
