"""From a drafter's own ``prob`` to a measured one: what share of nodes with that source, depth and claim were accepted, for this request.

Per (source, depth) a monotone curve over the claimed conditional probability: binned counts, shrunk towards the source's curve over all
depths and that towards the claim, then pooled adjacent violators (isotonic regression: Zadrozny and Elkan, KDD 2002). On top, one offset of
the log-odds per request and source. A node counts only if its parent was accepted, so pruning does not bias the curve.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np
from numba import njit

from presage.core.plan import Draft, Facts
from presage.core.types import Bytes, Floats, Ints, Singles
from presage.draft.length.positions import SPREAD, shifted, track

SOURCES, LEVELS, BINS = 8, 8, 16
CLAIM, POOL, WINDOW = 4.0, 8.0, 600.0
REFIT = 8
NO_SOURCE: Bytes = np.empty(0, np.uint8)


@njit(cache=True, nogil=True)
def _level(depth):
    """Depths 1-4 each, then 5-6, 7-10, 11-18, beyond."""
    if depth <= 4:
        return depth - 1
    return 4 if depth <= 6 else 5 if depth <= 10 else 6 if depth <= 18 else 7


@njit(cache=True, nogil=True)
def _scale(p):
    """Claims [0, 1] stretched near 1, where a draft of sixteen lives or dies."""
    return 1.0 - math.sqrt(max(1.0 - p, 0.0))


@njit(cache=True, nogil=True)
def _claim(prob, parent, first, j):
    """A node's conditional claim: its path probability over its parent's."""
    p = float(prob[first + j])
    if parent[first + j] >= 0:
        up = float(prob[first + parent[first + j]])
        p = p / up if up > 0.0 else 0.0
    return min(max(p, 0.0), 1.0)


@njit(cache=True, nogil=True)
def _look(curve, centre, g):
    """The fitted probability at stretched claim ``g``: between two bin centres the straight line."""
    k = min(int(g * BINS), BINS - 1)
    if g < centre[k] and k > 0:
        k -= 1
    if k + 1 >= BINS or g <= centre[k]:
        return curve[k]
    share = min((g - centre[k]) / max(centre[k + 1] - centre[k], 1e-9), 1.0)
    return curve[k] + share * (curve[k + 1] - curve[k])


@njit(cache=True, nogil=True)
def _estimate(slot, offset, parent, depth, prob, source, curve, centre, odds, base, path):
    """``base`` [N]: conditional probability for the server; ``path`` [N]: path probability for the request."""
    for s in range(len(slot)):
        first = offset[s]
        for j in range(offset[s + 1] - first):
            n = first + j
            src = min(source[n], SOURCES - 1) if len(source) else 0
            level = _level(depth[n])
            base[n] = _look(curve[src, level], centre[src, level], _scale(_claim(prob, parent, first, j)))
            p = shifted(base[n], odds[slot[s], src])
            path[n] = np.float32(p * path[first + parent[n]] if parent[n] >= 0 else p)


@njit(cache=True, nogil=True)
def _learn(slot, nodes, offset, parent, depth, prob, source, path_off, path, base, tried, hits, claims, shift, spread, odds):
    """Count every node whose parent was accepted."""
    for s in range(len(slot)):
        first, c = offset[s], slot[s]
        a = path_off[s] if len(path_off) else 0
        accepted = path_off[s + 1] - a if len(path_off) else 0
        for j in range(nodes[s]):
            n = first + j
            d = depth[n]
            if d - 1 > accepted or (d >= 2 and path[a + d - 2] != parent[n]):
                continue
            outcome = 1.0 if d <= accepted and path[a + d - 1] == j else 0.0
            src = min(source[n], SOURCES - 1) if len(source) else 0
            g = _scale(_claim(prob, parent, first, j))
            k, level = min(int(g * BINS), BINS - 1), _level(d)
            tried[src, level, k] += 1.0
            hits[src, level, k] += outcome
            claims[src, level, k] += g
            track(shift[c], spread[c], src, shifted(base[n], math.exp(shift[c, src])), outcome)
            odds[c, src] = math.exp(shift[c, src])


@njit(cache=True, nogil=True)
def _isotonic(value, weight):
    """Pool adjacent violators, in place: the closest non-decreasing curve."""
    n = len(value)
    mean, mass, size = np.empty(n), np.empty(n), np.empty(n, np.int64)
    top = 0
    for k in range(n):
        mean[top], mass[top], size[top] = value[k], weight[k], 1
        top += 1
        while top > 1 and mean[top - 2] > mean[top - 1]:
            both = mass[top - 2] + mass[top - 1]
            mean[top - 2] = (mean[top - 2] * mass[top - 2] + mean[top - 1] * mass[top - 1]) / both
            mass[top - 2], size[top - 2] = both, size[top - 2] + size[top - 1]
            top -= 1
    k = 0
    for i in range(top):
        for _ in range(size[i]):
            value[k] = mean[i]
            k += 1


@njit(cache=True, nogil=True)
def _fit(tried, hits, claims, curve, centre):
    """Curves of all sources and depths from the counts; counts age by a window."""
    weight = np.empty(BINS)
    for src in range(SOURCES):
        for level in range(LEVELS):
            for k in range(BINS):
                n_all = hits_all = 0.0
                for other in range(LEVELS):
                    n_all += tried[src, other, k]
                    hits_all += hits[src, other, k]
                g = (k + 0.5) / BINS
                claim = 0.02 + 0.85 * (1.0 - (1.0 - g) * (1.0 - g))
                pooled = (hits_all + CLAIM * claim) / (n_all + CLAIM)
                n = tried[src, level, k]
                curve[src, level, k] = (hits[src, level, k] + POOL * pooled) / (n + POOL)
                centre[src, level, k] = (claims[src, level, k] + g) / (n + 1.0)
                weight[k] = n + CLAIM
                if n > WINDOW:
                    tried[src, level, k] *= WINDOW / n
                    hits[src, level, k] *= WINDOW / n
                    claims[src, level, k] *= WINDOW / n
            _isotonic(curve[src, level], weight)
            for k in range(BINS):
                curve[src, level, k] = min(max(curve[src, level, k], 1e-4), 0.9995)


class Acceptance:
    """Calibrated acceptance probabilities. ``shift`` [C, SOURCES]: log-odds offsets of requests; sources from SOURCES - 1 on share one."""

    def __init__(self) -> None:
        shape = (SOURCES, LEVELS, BINS)
        self.tried, self.hits, self.claims = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.curve, self.centre = np.empty(shape), np.empty(shape)
        _fit(self.tried, self.hits, self.claims, self.curve, self.centre)
        self.shift, self.spread, self.odds = np.zeros((0, SOURCES)), np.zeros((0, SOURCES)), np.zeros((0, SOURCES))
        self._since = 0
        self.fit(64)

    def fit(self, capacity: int) -> None:
        """Make room for slots below ``capacity``."""
        more = capacity - len(self.shift)
        if more > 0:
            self.shift = np.concatenate([self.shift, np.zeros((more, SOURCES))])
            self.spread = np.concatenate([self.spread, np.full((more, SOURCES), SPREAD)])
            self.odds = np.concatenate([self.odds, np.ones((more, SOURCES))])

    def reset(self, slots: Ints) -> None:
        """New requests took these slots."""
        self.shift[slots], self.spread[slots], self.odds[slots] = 0.0, SPREAD, 1.0

    def path(self, slots: Ints, draft: Draft) -> Singles:
        """P(accepted) of every node from the root [N]; never above the parent's. ``slots`` [G]: whose spans they are."""
        return self._both(slots, draft)[1]

    def _both(self, slots: Ints, draft: Draft) -> tuple[Floats, Singles]:
        base, path = np.empty(len(draft)), np.empty(len(draft), np.float32)
        if not len(draft):
            return base, path
        source = draft.source if len(draft.source) else NO_SOURCE
        _estimate(slots, draft.offset, draft.parent, draft.depth, draft.prob, source, self.curve, self.centre, self.odds, base, path)
        return base, path

    def observe(self, facts: Facts) -> None:
        """One finished step."""
        plan, done, d = facts.plan, facts.done, facts.plan.draft
        if not len(d):
            return
        base, _ = self._both(plan.slot, d)
        source = d.source if len(d.source) else NO_SOURCE
        _learn(
            plan.slot, plan.nodes, d.offset, d.parent, d.depth, d.prob, source, done.path_off, done.path, base,
            self.tried, self.hits, self.claims, self.shift, self.spread, self.odds,
        )  # fmt: skip
        self._since += 1
        if self._since >= REFIT:
            _fit(self.tried, self.hits, self.claims, self.curve, self.centre)
            self._since = 0

    def fade(self) -> None:
        """Time passes: requests drift back to what is usual for their source."""
        self.shift *= 1.0 - 1.0 / 512
        self.spread += (SPREAD - self.spread) / 512
        np.exp(self.shift, out=self.odds)
