"""The largest rate that still meets the goals, by doubling and bisection. A trial is any function of a rate: a simulator's or a server's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from presage.core.errors import ConfigError

Trial = Callable[[float], float]
"""Share of requests that met the goals at a rate (0 to 1)."""


@dataclass(slots=True)
class Capacity:
    """``rate`` is the highest that passed (0: none did); ``trials`` (rate, attainment) in order; ``noisy``: a lower rate than it failed."""

    rate: float
    trials: list[tuple[float, float]] = field(default_factory=list)
    noisy: bool = False


def capacity_search(
    trial: Trial, target: float = 0.9, start: float = 1.0, tolerance: float = 0.05, lowest: float = 1e-3, highest: float = 1e6
) -> Capacity:
    """Goodput as DistServe defines it: the largest rate at which ``target`` of the requests meet all goals, within ``tolerance`` of itself.

    Doubles from ``start`` until it fails (halves until it passes), then bisects on a logarithmic scale. A rate that failed below one that
    passed is noise, and said to be (``noisy``): such a trial was too short. Raises ConfigError for bounds that are none.
    """
    if not (0 < lowest <= start <= highest and 0 < target <= 1 and tolerance > 0):
        raise ConfigError("capacity search needs 0 < lowest <= start <= highest, a target up to 1 and a positive tolerance", param="capacity")
    found = Capacity(0.0)

    def passes(rate: float) -> bool:
        share = trial(rate)
        found.trials.append((rate, share))
        return share >= target

    low, high = _bracket(passes, start, lowest, highest)
    while low > 0 and high / low > 1 + tolerance and math.isfinite(high):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    found.rate = low
    failed = [r for r, share in found.trials if share < target]
    found.noisy = bool(failed) and min(failed) < low
    return found


def _bracket(passes: Callable[[float], bool], start: float, lowest: float, highest: float) -> tuple[float, float]:
    """A rate that passes (0: none) and one that fails (inf: none)."""
    low, high, rate = 0.0, math.inf, start
    if passes(rate):
        while rate < highest:
            low, rate = rate, min(2 * rate, highest)
            if not passes(rate):
                return low, rate
        return rate, high
    while rate > lowest:
        high, rate = rate, max(rate / 2, lowest)
        if passes(rate):
            return rate, high
    return 0.0, rate
