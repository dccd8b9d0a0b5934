"""Which instance gets a call of a workflow stage: HexGen-Text2SQL's balanced dispatch (arXiv 2505.05286, level 1).

score = alpha x mean time / time on the instance - (1 - alpha) x outstanding work / mean outstanding work. The paper's code normalises by the
first instance and never takes finished work off; here the mean of all is the reference and what is finished is taken off, so the score neither
depends on the order of the list nor on a long past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from presage.core.request import Request
from presage.core.types import Floats

Times = Mapping[str, Sequence[float]]
"""Mean seconds of a stage by instance."""


class BalancedDispatch:
    """A route of the simulator: ``dispatch(request, replicas) -> index``; ``ended(request)`` when a call finished.

    ``alpha``: weight of suitability against balance, in [0, 1]. Calls without a known ``Request.stage`` count the mean of all stages.
    """

    def __init__(self, times: Times, alpha: float = 0.2) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError("alpha must be in [0, 1]")
        self.alpha = alpha
        self.times: dict[str, Floats] = {stage: np.asarray(t, np.float64) for stage, t in times.items()}
        self._mean: Floats = np.asarray(np.mean(list(self.times.values()), axis=0))
        self.work = np.zeros(len(self._mean))
        self._open: dict[str, tuple[int, float]] = {}

    def __call__(self, request: Request, replicas: Sequence[Any]) -> int:
        """The instance with the best score; the first of equals."""
        t = self.times.get(request.stage or "", self._mean)
        load = self.work / max(float(self.work.mean()), 1e-9)
        best = int(np.argmax(self.alpha * t.mean() / t - (1 - self.alpha) * load))
        self.work[best] += t[best]
        self._open[request.id] = best, float(t[best])
        return best

    def ended(self, request: Request) -> None:
        """A call finished: its work is done."""
        at, seconds = self._open.pop(request.id, (0, 0.0))
        self.work[at] = max(0.0, self.work[at] - seconds)

    def after(self, then: Callable[[Request, float], Iterable[Request]]) -> Callable[[Request, float], Iterable[Request]]:
        """``then(request, now)`` as the simulator's ``after``, with finished calls taken off first."""

        def ended(request: Request, now: float) -> Iterable[Request]:
            self.ended(request)
            return then(request, now)

        return ended


def tune_alpha(measure: Callable[[float], float], candidates: Iterable[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)) -> tuple[float, float]:
    """The candidate with the least ``measure(alpha)`` (a simulated P95, or the tightest deadline that holds), and that value."""
    found = [(measure(a), a) for a in candidates]
    best = min(found)
    return best[1], best[0]
