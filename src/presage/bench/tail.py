"""How many requests a statement about a tail needs (MLPerf Inference's early stopping)."""

from __future__ import annotations

import math


def _log_binomial(n: int, k: int, p: float) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log1p(-p) + (n - k) * math.log(p)


def doubt(within: int, over: int, p: float) -> float:
    """Chance of seeing at most ``over`` late requests among all if more than a share 1 - ``p`` of requests were late."""
    n = within + over
    return min(1.0, sum(math.exp(_log_binomial(n, k, p)) for k in range(over + 1)))


def requests_needed(over: int, p: float, confidence: float = 0.99) -> int:
    """Requests in all, ``over`` of them late, after which the ``p`` quantile (0 to 1) can be said to be in time with this confidence."""
    low, high = over, max(64, 2 * over)
    while doubt(high - over, over, p) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if doubt(middle - over, over, p) <= 1 - confidence else (middle, high)
    return high
