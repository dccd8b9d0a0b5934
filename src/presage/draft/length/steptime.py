"""Seconds of a step from its twelve features, learnt while serving.

A non-negative linear model of the work (SmartSpec, arXiv 2406.14066, section 4: context, batched tokens, constant), and on it a correction by the
number of rows: kernels work in tiles and graphs are padded, so time has steps that no line has. Each row count up to 256 has its own
correction, above that sixteen per octave; counts never seen borrow from their neighbours.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np
from numba import njit

from presage.core.plan import Facts
from presage.core.types import Floats
from presage.draft.length.regression import Regression

EXACT, OCTAVES, PER_OCTAVE = 256, 4, 16
BUCKETS = EXACT + OCTAVES * PER_OCTAVE + 1
UNITS = (1.0, 64.0, 64.0, 65536.0, 1048576.0)
PRIOR = (1e-2, 3e-3, 1e-3, 2e-3, 1e-3)
BORROW = 1.0
STREAK = 5
WINDOW, SPOILT = 16.0, 0.7
NEAR = math.exp(-1 / 8)


def _places() -> Floats:
    """Where a row count falls among the corrections, as a fraction between two of them; looked up because a logarithm per row is slow."""
    rows = np.arange(EXACT << OCTAVES)
    above = EXACT - 1 + PER_OCTAVE * np.log2(np.maximum(rows, EXACT) / EXACT)
    return np.where(rows <= EXACT, np.maximum(rows - 1, 0), above)


PLACES = _places()


@njit(cache=True, nogil=True)
def _bucket(rows):
    """Which correction a row count uses: (lower bucket, share of the next one)."""
    at = PLACES[min(max(int(rows), 0), len(PLACES) - 1)]
    low = min(int(at), BUCKETS - 2)
    return low, at - low


@njit(cache=True, nogil=True)
def _work(f, x):
    """The model's inputs: constant, rows (of whole stacks), rows with logits, KV tokens, row x context pairs, each in its unit."""
    x[0] = 1.0
    x[1] = f[0] * (f[8] if f[8] > 0.0 else 1.0) / UNITS[1]
    x[2] = f[5] / UNITS[2]
    x[3] = f[6] / UNITS[3]
    x[4] = f[7] / UNITS[4]


@njit(cache=True, nogil=True)
def _predict(features, theta, factor, watts, out):
    x = np.empty(5)
    for m in range(len(features)):
        f = features[m]
        _work(f, x)
        t = 0.0
        for i in range(5):
            t += theta[i] * x[i]
        low, share = _bucket(f[0])
        t = t * (factor[low] * (1.0 - share) + factor[low + 1] * share) + f[11]
        # Replays must agree on the last bit of a learnt float, so nobody sees more than a microsecond of it.
        t = math.floor(t * 1e6 + 0.5) * 1e-6
        out[m, 0] = t
        out[m, 1] = t * watts


@njit(cache=True, nogil=True)
def _correct(log_ratio, seen, factor, bucket, new):
    """Take one measured log-ratio into its bucket; renew the multipliers of all: a bucket's own mean, shrunk towards its neighbours'."""
    n = len(log_ratio)
    for i in range(n):
        # Corrections nobody renews fade: a count that once looked slow is tried again.
        seen[i] *= 0.9995
    if new < log_ratio[bucket] - SPOILT:
        seen[bucket] = 0.0  # no step is that fast by accident: what was believed came from a pause or a compilation
    seen[bucket] = min(seen[bucket] + 1.0, WINDOW)
    log_ratio[bucket] += (new - log_ratio[bucket]) / seen[bucket]
    near = 0.0
    for i in range(n):
        near *= NEAR
        factor[i] = near
        if seen[i] > 0.0:
            near = log_ratio[i]
    near = 0.0
    for i in range(n - 1, -1, -1):
        near *= NEAR
        factor[i] = math.exp((seen[i] * log_ratio[i] + BORROW * 0.5 * (factor[i] + near)) / (seen[i] + BORROW))
        if seen[i] > 0.0:
            near = log_ratio[i]


class StepTime:
    """Implements ``core.protocols.LatencyModel``. Plain arrays: picklable, and equal inputs give equal bits.

    A step that takes far longer than predicted (garbage collection, a kernel being compiled) is counted as a mildly slow one, unless it keeps
    happening. A step cannot be too fast by accident: a first prediction spoilt by start-up is thrown away at the first fast step.
    """

    def __init__(self, forget: float = 0.005) -> None:
        self._line = Regression(list(PRIOR), keep=1.0 - forget)
        self._log_ratio, self._seen = np.zeros(BUCKETS), np.zeros(BUCKETS)
        self._factor = np.ones(BUCKETS)
        self.steps, self._streak, self._spread, self._watts = 0, 0, 0.1, 0.0

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2] of steps with ``features`` [m, 12], rounded to 1 microsecond."""
        out = np.empty((len(features), 2))
        _predict(features, self._line.theta, self._factor, self._watts, out)
        return out

    def observe(self, facts: Facts) -> None:
        """One finished step."""
        done, repeat = facts.done, max(1, facts.plan.repeat)
        seconds = (done.t1 - done.t0) / repeat
        if seconds > 0.0:
            self.learn(facts.plan.features, seconds)
            self._watts += 0.05 * (done.joules / repeat / seconds - self._watts)

    def learn(self, features: Floats, seconds: float) -> None:
        """``seconds`` > 0 were measured for a step with ``features`` [12]."""
        seconds = max(seconds - float(features[11]), 1e-7)
        guess = max(float(self.predict(features[None])[0, 0] - features[11]), 1e-7)
        low, share = _bucket(features[0])
        bucket = low + (share > 0.5)
        self.steps += 1
        if self.steps == 1 or (seconds < guess / 3 and self.steps < 64):
            self._restart(seconds / guess)
            guess = seconds
        seconds = self._believable(seconds, guess, known=self._seen[bucket] >= 2.0)
        x = np.empty(5)
        _work(features, x)
        self._line.update(x, seconds)
        ratio = math.log(seconds / max(float(self._line.theta @ x), 1e-7))
        _correct(self._log_ratio, self._seen, self._factor, bucket, ratio)

    def _restart(self, factor: float) -> None:
        self._line.rescale(factor)
        self._log_ratio[:], self._seen[:], self._factor[:] = 0.0, 0.0, 1.0

    def _believable(self, seconds: float, guess: float, known: bool) -> float:
        """A measurement cut to what may be learnt from it. Row counts not seen before, and the first steps, may surprise more."""
        if self.steps < 64 and not known:
            return seconds
        error, bound = math.log(seconds / guess), max(4.0 * self._spread, 0.15 if known else 1.0)
        if error > bound and self._streak < STREAK:
            self._streak += 1
            return guess * math.exp(bound)
        self._streak = 0 if error <= bound else self._streak
        self._spread += 0.05 * (min(abs(error), bound) - self._spread)
        return seconds
