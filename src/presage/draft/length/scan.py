"""The marginal scan: all candidate nodes of a batch in the order of their probability, a predicted time for every prefix, the best prefix.

Maximising (tokens of the step) / (seconds of the step) over prefixes of that order is exact for any latency that depends on how many rows
there are, whatever its shape: time has steps (tiles, graph sizes), so the ratio has many local maxima and all of them are looked at.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from presage.core.protocols import LatencyModel
from presage.core.types import Floats, Ints, Singles

FEATURES = 12
CURIOUS = 0.06
NO_VISITS: Floats = np.empty(0)
FLOOR = np.float32(1e-4)
URGENT_FLOOR = np.float32(0.05)
# The bits of positive floats sort like the floats; the top 7 of the mantissa are enough here, and 1e-4 is fourteen powers of two below 1.
ONE, COARSE = 0x3F800000, 16
LEVELS = 14 << (23 - COARSE)


@njit(cache=True, nogil=True)
def _order(offset, path, bits, whole, urgent):
    """Candidates by falling probability (in steps of 0.8 %), urgent spans' likely ones first, equals in plan order: a counting sort."""
    place = np.full(offset[-1], -1, np.int32)
    start = np.zeros(2 * LEVELS + 1, np.int32)
    for g in range(len(offset) - 1):
        for n in range(offset[g], offset[g + 1]):
            if path[n] >= FLOOR and not whole[g]:
                below = ONE - np.int64(bits[n])
                level = (below if below > 0 else 0) >> COARSE
                place[n] = level if urgent[g] and path[n] >= URGENT_FLOOR else level + LEVELS
                start[place[n] + 1] += 1
    for k in range(2 * LEVELS):
        start[k + 1] += start[k]
    order = np.empty(start[-1], np.int32)
    for n in range(offset[-1]):
        if place[n] >= 0:
            order[start[place[n]]] = n
            start[place[n]] += 1
    return order


@njit(cache=True, nogil=True)
def _grow(f, start, rows):
    """One more draft row on a span that starts at ``start`` and has ``rows`` rows: the same sums as ``engine.kernels.mark``."""
    f[0] += 1.0
    f[4] += 1.0
    f[5] += 1.0
    f[6] += 1.0
    f[7] += start + 2.0 * rows + 1.0


@njit(cache=True, nogil=True)
def step_features(start, tokens, samples, share, f):
    """Features of the step without drafts; returns how many spans sample."""
    emitted = 0.0
    f[:] = 0.0
    for g in range(len(start)):
        f[0] += tokens[g]
        f[6] += start[g] + tokens[g]
        f[7] += float(tokens[g]) * (start[g] + tokens[g])
        if samples[g]:
            emitted += 1.0
            f[5] += 1.0
            if tokens[g] == 1:
                f[2] += 1.0
    f[1] = len(start)
    f[3] = f[0] - f[2]
    f[8] = share
    return emitted


@njit(cache=True, nogil=True)
def _prefixes(offset, path, bits, urgent, cap, whole, start, tokens, samples, share, features, value, picked):
    """Features and expected tokens of every prefix, row 0 being the step with nothing optional in it, then one for the step without
    drafts and one for its decoding spans alone. Returns the number of the last prefix.
    """
    owner = np.empty(offset[-1], np.int32)
    rows = np.empty(len(start), np.int64)
    value[0] = step_features(start, tokens, samples, share, features[0])
    for g in range(len(start)):
        rows[g] = tokens[g]
        for n in range(offset[g], offset[g + 1]):
            owner[n] = g
            if whole[g] and n - offset[g] < cap[g]:
                _grow(features[0], start[g], rows[g])
                rows[g] += 1
                value[0] += path[n]
    last = 0
    for n in _order(offset, path, bits, whole, urgent):
        g = owner[n]
        if rows[g] - tokens[g] >= cap[g]:
            continue
        features[last + 1] = features[last]
        _grow(features[last + 1], start[g], rows[g])
        rows[g] += 1
        value[last + 1] = value[last] + path[n]
        picked[last] = n
        last += 1
    step_features(start, tokens, samples, share, features[last + 1])
    alone = samples & (tokens == 1)
    step_features(start[alone], tokens[alone], samples[alone], share, features[last + 2])
    return last


@njit(cache=True, nogil=True)
def _best(value, seconds, rows, visits, curious, credit, extra):
    """The prefix with most tokens per second; ``credit``: seconds of prompt work, ``extra``: seconds outside the model."""
    best, at = -1.0, 0
    for n in range(len(value)):
        # A row count that was hardly ever run may be faster than the model thinks: it is tried while it looks almost as good as the best.
        seen = visits[min(int(rows[n]), len(visits) - 1)] if len(visits) else math.inf
        rate = value[n] / max(seconds[n] * (1.0 - curious / (1.0 + seen)) - credit + extra, 1e-9)
        if rate > best:
            best, at = rate, n
    return at


@njit(cache=True, nogil=True)
def _best_within(value, seconds, credit, extra, offset, path, picked, whole, cap, each):
    """As ``_best`` among prefixes in which every target is met; if there are none, the one that misses by the smallest factor."""
    spans = len(each)
    owner, expect = np.empty(offset[-1], np.int32), np.ones(spans)
    for g in range(spans):
        for n in range(offset[g], offset[g + 1]):
            owner[n] = g
            if whole[g] and n - offset[g] < cap[g]:
                expect[g] += path[n]
    best, at, least, nearest, worst, who = -1.0, -1, math.inf, 0, 0.0, -1
    for n in range(len(value)):
        if n > 0:
            expect[owner[picked[n - 1]]] += path[picked[n - 1]]
        if n == 0 or owner[picked[n - 1]] == who:
            # Expectations only grow, so the tightest target changes only when its own does.
            worst = 0.0
            for g in range(spans):
                need = 1.0 / (each[g] * expect[g])
                if need > worst:
                    worst, who = need, g
        step = seconds[n] + extra
        rate = value[n] / max(step - credit, 1e-9)
        if worst * step <= 1.0 and rate > best:
            best, at = rate, n
        if worst * step < least:
            least, nearest = worst * step, n
    return at if at >= 0 else nearest


@dataclass(slots=True)
class Batch:
    """The spans of a step, in plan order, [G] each: first row's position, known tokens, who samples, node caps, whose drafts are not
    to be pruned (``whole``), seconds allowed per token (``each``, None = no targets). ``share``: part of the layers that is run."""

    start: Ints
    tokens: Ints
    samples: np.ndarray
    cap: Ints
    whole: np.ndarray
    each: Floats | None = None
    share: float = 1.0


@dataclass(slots=True)
class Choice:
    """``keep`` [N]; expected ``tokens`` and predicted ``seconds`` of the step with them; ``plain`` seconds without any, the first ``row``'s;
    ``order``: the optional nodes kept, most likely first (the last one is a leaf of what is kept)."""

    keep: np.ndarray
    tokens: float
    seconds: float
    plain: float
    row: float
    order: Ints


def best_nodes(
    batch: Batch,
    offset: Ints,
    path: Singles,
    latency: LatencyModel,
    extra: float = 0.0,
    visits: Floats = NO_VISITS,
    curious: float = CURIOUS,
) -> Choice:
    """The nodes worth verifying. ``offset`` [G + 1], ``path`` float32 [N] (never above the parent's, parents first).

    The mask is prefix-closed and holds at most ``cap`` nodes per span. Prompt rows in the step are work that is due anyway: their time does
    not count, only what a draft row costs beside them. ``visits`` [R]: how often each row count was run lately; empty = the model is
    trusted, else counts never run are taken to be faster by the share ``curious``. Linear in nodes.
    """
    total, spans = int(offset[-1]), len(batch.start)
    urgent = np.zeros(spans, np.bool_) if batch.each is None else np.isfinite(batch.each)
    features, value, picked = np.empty((total + 3, FEATURES)), np.empty(total + 1), np.empty(total, np.int32)
    last = _prefixes(
        offset, path, path.view(np.uint32), urgent, batch.cap, batch.whole, batch.start, batch.tokens, batch.samples, batch.share,
        features, value, picked,
    )  # fmt: skip
    predicted = np.ascontiguousarray(latency.predict(features[: last + 3])[:, 0])
    value, seconds, plain, alone = value[: last + 1], predicted[: last + 1], float(predicted[-2]), float(predicted[-1])
    credit = max(plain - alone, 0.0)
    if urgent.any():
        assert batch.each is not None
        at = _best_within(value, seconds, credit, extra, offset, path, picked, batch.whole, batch.cap, batch.each)
    else:
        at = _best(value, seconds, features[:, 0], visits, curious, credit, extra)
    row = max(float(seconds[min(last, 1)] - seconds[0]), 0.0)
    keep = np.zeros(total, np.bool_)
    keep[picked[:at]] = True
    for g in np.flatnonzero(batch.whole).tolist():
        keep[offset[g] : min(offset[g] + int(batch.cap[g]), offset[g + 1])] = True
    return Choice(keep, float(value[at]), float(seconds[at]), plain, row, picked[:at])
