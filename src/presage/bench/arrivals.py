"""When requests are sent: Poisson, gamma or constant gaps, all drawn beforehand from a seed so that every server sees the same schedule."""

from __future__ import annotations

import math

import numpy as np

from presage.core.errors import ConfigError


def arrival_times(n: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> np.ndarray:
    """Send times [n] in seconds from the start, float64, ascending.

    ``rate`` requests/s, inf = all at once. Gaps are gamma with shape ``burstiness`` (1 = Poisson, below = bursty, inf = constant; the
    coefficient of variation is burstiness ** -0.5), rescaled so that they sum to n / rate: the offered rate is then exact.
    Raises ConfigError for values that are not positive.
    """
    if not rate > 0:
        raise ConfigError(f"request_rate must be positive, got {rate}", param="request_rate")
    if not burstiness > 0:
        raise ConfigError(f"burstiness must be positive, got {burstiness}", param="burstiness")
    if math.isinf(rate) or n == 0:
        return np.zeros(n)
    if math.isinf(burstiness):
        return np.arange(1, n + 1) / rate
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), n)
    return np.asarray(np.cumsum(gaps) * (n / rate / gaps.sum()))
