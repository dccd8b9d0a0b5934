"""What a step would take: the engine's latency model if it has one, else a line learnt from the steps that were seen.

Policies ask in terms of a decoding batch and a chunk; the twelve features are the engine's (``engine.features``).
"""

from __future__ import annotations

import numpy as np

from presage.core.plan import Facts
from presage.core.protocols import EngineView
from presage.core.types import Floats

UNITS = np.array([1.0, 64.0, 65536.0, 1048576.0])
"""Of the constant, rows, keys read and row x context pairs, so that their weights are of one size."""
KEEP = 0.995


def mixed(decodes: float, context: float, chunk: np.ndarray | float, start: float = 0.0) -> Floats:
    """Features [m, 12] of ``decodes`` rows that read ``context`` keys together, beside a chunk of ``chunk`` [m] tokens after ``start``."""
    c = np.atleast_1d(np.asarray(chunk, np.float64))
    f = np.zeros((len(c), 12))
    f[:, 0], f[:, 1], f[:, 2], f[:, 3] = decodes + c, decodes + (c > 0), decodes, c
    f[:, 5] = decodes + (c > 0)
    f[:, 6] = context + np.where(c > 0, start + c, 0.0)
    f[:, 7] = context + c * (start + c)
    f[:, 8] = 1.0
    return f


class Pace:
    """Seconds of a step. Least squares of relative errors with forgetting; weights below zero are cut: more work takes no less time."""

    def __init__(self) -> None:
        self.steps = 0
        self._a, self._b = np.zeros((4, 4)), np.zeros(4)
        self._weights = np.zeros(4)
        self._stale = False

    def known(self, view: EngineView) -> bool:
        """Whether ``seconds`` means anything yet."""
        return view.latency is not None or self.steps >= 8

    def seconds(self, view: EngineView, features: Floats) -> Floats:
        """Seconds [m] of steps with ``features`` [m, 12], to the microsecond."""
        if view.latency is not None:
            return np.asarray(view.latency.predict(features)[:, 0])
        if self._stale:
            scale = float(np.trace(self._a)) or 1.0
            self._weights = np.maximum(0.0, np.linalg.solve(self._a + 1e-6 * scale * np.eye(4), self._b))
            self._stale = False
        return np.round(_terms(features) @ self._weights, 6)

    def observe(self, facts: Facts) -> None:
        """One finished step."""
        took = facts.done.t1 - facts.done.t0
        if took <= 0 or not facts.plan.features[0]:
            return
        x = _terms(facts.plan.features[None])[0] / took
        self._a = KEEP * self._a + np.outer(x, x)
        self._b = KEEP * self._b + x
        self.steps, self._stale = self.steps + 1, True


def _terms(f: Floats) -> Floats:
    share = np.where(f[:, 8] > 0, f[:, 8], 1.0)
    return np.stack([np.ones(len(f)), f[:, 0] * share, f[:, 6] * share, f[:, 7] * share], axis=1) / UNITS
