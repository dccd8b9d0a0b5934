"""Recursive least squares with forgetting in information form: old evidence leaks towards a prior, and coefficients stay non-negative.

The textbook covariance form winds up when the inputs stop varying (a server at constant load), and collinear inputs give it negative prices.
Here the normal equations themselves are aged and re-solved by a few sweeps of coordinate descent from the last answer.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import njit

from presage.core.types import Floats

SWEEPS = 12


@njit(cache=True, nogil=True)
def _update(a, b, theta, prior, weight, x, y, keep):
    """Age, add one observation in relative units (so that long steps do not outvote short ones), re-solve."""
    n = len(theta)
    inv = 1.0 / max(y, 1e-9)
    scale = 0.0
    for i in range(n):
        scale += theta[i]
    for i in range(n):
        # The prior is worth ``weight`` observations of a typical step; aging the rest leaves it in place.
        ridge = weight[i] / max(scale * scale, 1e-18)
        for j in range(n):
            a[i, j] = keep * a[i, j] + x[i] * x[j] * inv * inv
        a[i, i] += (1.0 - keep) * ridge
        b[i] = keep * b[i] + x[i] * inv + (1.0 - keep) * ridge * prior[i]
    for _ in range(SWEEPS):
        for i in range(n):
            if a[i, i] > 0.0:
                residual = b[i]
                for j in range(n):
                    residual -= a[i, j] * theta[j]
                theta[i] = max(0.0, theta[i] + residual / a[i, i])


class Regression:
    """y = theta . x with theta >= 0, learnt online. ``theta`` [n]; ``prior`` [n] is where it returns to without evidence."""

    def __init__(self, prior: list[float], weight: float = 0.5, keep: float = 0.995) -> None:
        self.prior = np.array(prior, np.float64)
        self.theta = self.prior.copy()
        self.keep = keep
        self.weight = np.full(len(prior), weight)
        self._a = np.zeros((len(prior), len(prior)))
        self._b = np.zeros(len(prior))

    def update(self, x: Floats, y: float) -> None:
        """Take in one observation (``x`` [n], ``y`` > 0)."""
        _update(self._a, self._b, self.theta, self.prior, self.weight, x, y, self.keep)

    def rescale(self, factor: float) -> None:
        """Everything learnt so far was too small by ``factor``: keep the proportions, forget the evidence."""
        self.theta *= factor
        self.prior *= factor
        self._a[:] = 0.0
        self._b[:] = 0.0
