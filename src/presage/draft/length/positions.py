"""Acceptance by position, before anything is drafted: P(position d is accepted | d-1 was), for the server and for each request.

SmartSpec's statistic (arXiv 2406.14066) without its i.i.d. assumption: acceptance decays with position and differs between requests. Only events
that were really judged count (the position before was accepted and a candidate was there), so a short draft says nothing about far
positions instead of saying that they fail. A request's own tendency is one number, an offset of the log-odds, tracked by a Kalman filter.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np
from numba import njit

from presage.core.plan import Facts
from presage.core.types import Floats, Ints

DEPTHS = 64
START = 0.7
BORROW = 4.0
WINDOW = 400.0
SPREAD = 1.0
DRIFT = 0.004


@njit(cache=True, nogil=True)
def track(offset, spread, i, expected, outcome):
    """One Bernoulli outcome moves offset ``i`` of the log-odds: a step of an extended Kalman filter. ``expected`` includes the offset."""
    slope = expected * (1.0 - expected)
    gain = spread[i] / (1.0 + spread[i] * slope)
    offset[i] = min(max(offset[i] + gain * (outcome - expected), -6.0), 6.0)
    spread[i] = gain + DRIFT


@njit(cache=True, nogil=True)
def shifted(p, odds):
    """Probability ``p`` with its odds multiplied."""
    o = p * odds
    return o / (1.0 - p + o) if o > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _learn(slot, nodes, node_off, parent, depth, path_off, path, tried, hits, rate, offset, spread):
    """Count judged positions of every span; returns the number of spans that drafted."""
    drafts = 0
    reach = np.zeros(len(tried) + 1, np.bool_)
    for s in range(len(slot)):
        if nodes[s] == 0:
            continue
        drafts += 1
        first, c = node_off[s], slot[s]
        accepted = path_off[s + 1] - path_off[s] if len(path_off) else 0
        reach[:] = False
        for j in range(nodes[s]):
            d, up = depth[first + j], parent[first + j]
            if d - 1 > accepted or d > len(tried):
                continue
            # A candidate was judged only if it hangs from the accepted path.
            if up < 0 or (d >= 2 and path[path_off[s] + d - 2] == up):
                reach[d] = True
        for d in range(1, min(accepted + 1, len(tried)) + 1):
            if reach[d]:
                outcome = 1.0 if d <= accepted else 0.0
                tried[d - 1] += 1.0
                hits[d - 1] += outcome
                track(offset, spread, c, shifted(rate[d - 1], math.exp(offset[c])), outcome)
    return drafts


@njit(cache=True, nogil=True)
def _rates(tried, hits, rate):
    """Server-wide conditional rates: each position starts from its predecessor's; counts age by a window."""
    last = START
    for d in range(len(tried)):
        last = (hits[d] + BORROW * last) / (tried[d] + BORROW)
        rate[d] = min(max(last, 1e-4), 0.9999)
        if tried[d] > WINDOW:
            hits[d] *= WINDOW / tried[d]
            tried[d] = WINDOW


@njit(cache=True, nogil=True)
def _curves(slot, length, at, rate, offset, out):
    """Path probabilities of a chain per slot: ``out[at[i]:at[i + 1]]``."""
    for i in range(len(slot)):
        p, odds = 1.0, math.exp(offset[slot[i]])
        for j in range(length[i]):
            p *= shifted(rate[min(j, len(rate) - 1)], odds)
            out[at[i] + j] = p


class Positions:
    """``rate`` [DEPTHS] for the server, ``offset`` [C] log-odds per slot with variance ``spread`` [C]."""

    def __init__(self) -> None:
        self.tried, self.hits = np.zeros(DEPTHS), np.zeros(DEPTHS)
        self.rate = np.full(DEPTHS, START)
        self.offset, self.spread = np.zeros(0), np.zeros(0)
        self.fit(64)

    def fit(self, capacity: int) -> None:
        """Make room for slots below ``capacity``."""
        more = capacity - len(self.offset)
        if more > 0:
            self.offset = np.concatenate([self.offset, np.zeros(more)])
            self.spread = np.concatenate([self.spread, np.full(more, SPREAD)])

    def reset(self, slots: Ints) -> None:
        """New requests took these slots."""
        self.offset[slots], self.spread[slots] = 0.0, SPREAD

    def curves(self, slots: Ints, length: Ints) -> tuple[Ints, Floats]:
        """(offsets [n + 1], path probabilities) of chains of ``length`` [n] for ``slots`` [n]."""
        at = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(length, out=at[1:])
        out = np.empty(int(at[-1]), np.float64)
        _curves(slots, length, at, self.rate, self.offset, out)
        return at, out

    def observe(self, facts: Facts) -> None:
        """One finished step."""
        plan, done = facts.plan, facts.done
        if not len(plan.draft):
            return
        d = plan.draft
        _learn(
            plan.slot, plan.nodes, d.offset, d.parent, d.depth, done.path_off, done.path,
            self.tried, self.hits, self.rate, self.offset, self.spread,
        )  # fmt: skip
        _rates(self.tried, self.hits, self.rate)

    def fade(self) -> None:
        """Time passes: what was learnt about a request is slowly forgotten, so that one which stopped drafting gets another chance."""
        self.offset *= 1.0 - 1.0 / 512
        self.spread += (SPREAD - self.spread) / 512
