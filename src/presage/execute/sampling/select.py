"""Truncation of a row without sorting it: bisect for the value down to which k entries, or a mass p, are kept.

Each probe is one vectorised pass; once few entries are left between the bounds, radix selection finishes. Masses are integers (2**30 is the
largest entry's), so that sums do not depend on their order. Larger entries come first, equal ones by their id: one kept set everywhere.
"""

# mypy: disable-error-code="arg-type, return-value, misc, assignment"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.execute.sampling.noise import block_peaks
from presage.execute.sampling.vecmath import BLOCK, KEY_NEG_INF, exp_neg, f32, i32, key_float, order_key, u32

_DROPPED = f32(-np.inf)
_UNIT = float(1 << 30)
_FEW = 128  # entries left to radix selection; below this a further pass over the row costs more than it saves


@njit("UniTuple(i8,2)(i8[::1],i8,i8)", cache=True, nogil=True)
def _crossing(mass: Any, limit: int, before: int) -> tuple[int, int]:
    """(bucket, mass above it): the bucket, from the top, in which the mass kept reaches ``limit``; -1 if it never does."""
    for b in range(len(mass) - 1, -1, -1):
        if before + mass[b] >= limit:
            return b, before
        before += mass[b]
    return -1, before


@njit("i8(i4[::1],i8,i8,i8)", cache=True, nogil=True)
def _ties(masses: Any, n: int, limit: int, before: int) -> int:
    """How many of ``n`` equal entries are kept: at least one."""
    ties = 0
    while ties < n and (before < limit or ties == 0):
        before += masses[ties]
        ties += 1
    return ties


@njit("UniTuple(i8,2)(u4[::1],i4[::1],i8,i8,i8)", cache=True, nogil=True)
def threshold(keys: Any, masses: Any, n: int, limit: int, before: int) -> tuple[int, int]:
    """(key, ties): keep every entry above ``key`` and the first ``ties`` equal to it: the mass before each kept entry is below ``limit``.

    ``keys`` uint32 and ``masses`` int32, first ``n`` entries in id order; both are overwritten. ``before``: mass kept already.
    (-1, 0) if all of them stay.
    """
    hist = np.empty(2048, np.int64)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        hist[:] = 0
        low = np.uint32((1 << bits) - 1)
        for i in range(n):
            hist[(keys[i] >> np.uint32(shift)) & low] += masses[i]
        bucket, before = _crossing(hist, limit, before)
        if bucket < 0:
            return -1, 0
        m = 0
        for i in range(n):
            if (keys[i] >> np.uint32(shift)) & low == bucket:
                keys[m], masses[m] = keys[i], masses[i]
                m += 1
        n = m
    if n == 0:
        return -1, 0
    return np.int64(keys[0]), _ties(masses, n, limit, before)


@njit("i8(f4[::1],f4,f4)", cache=True, nogil=True)
def _number(values: Any, least: float, ceiling: float) -> int:
    """How many entries lie in [least, ceiling)."""
    n = i32(0)
    for i in range(len(values)):
        n = i32(n + (i32(1) if values[i] >= least and not values[i] >= ceiling else i32(0)))
    return n


@njit("i8(f4[::1],i4[::1],f4)", cache=True, nogil=True)
def _mass(values: Any, masses: Any, least: float) -> int:
    """Mass of the entries that are at least ``least``."""
    total = np.int64(0)
    for i in range(len(values)):
        total += np.int64(masses[i] if values[i] >= least else i32(0))
    return total


@njit(inline="always")
def _any_in(values: Any, start: int, least: float, ceiling: float) -> bool:
    """Whether one of BLOCK values from ``start`` lies in [least, ceiling)."""
    found = i32(0)
    for i in range(BLOCK):
        x = values[start + i]
        found = i32(found | (i32(1) if (x >= least) & (not x >= ceiling) else i32(0)))
    return found != 0


@njit("i8(f4[::1],i4[::1],i4[::1],i8,i8,u4[::1],i4[::1])", cache=True, nogil=True)
def _gather(values: Any, masses: Any, peaks: Any, low: int, high: int, keys: Any, kept: Any) -> int:
    """Unsigned order keys and masses of the values with low <= key < high, in id order; returns how many."""
    m, floor, ceiling = 0, key_float(i32(low)), key_float(i32(high))
    for b in range(len(peaks)):
        start = b * BLOCK
        if peaks[b] < low or (start + BLOCK <= len(values) and not _any_in(values, start, floor, ceiling)):
            continue
        for i in range(start, min(len(values), start + BLOCK)):
            x = values[i]
            if (x >= floor) & (not x >= ceiling):
                keys[m] = u32(u32(order_key(x)) ^ u32(0x80000000))
                kept[m] = masses[i]
                m += 1
    return m


@njit("UniTuple(i8,2)(f4[::1],i4[::1],i4[::1],i8,i8,i8,u4[::1],i4[::1])", cache=True, nogil=True)
def _cut(values: Any, masses: Any, peaks: Any, low: int, high: int, limit: int, keys: Any, kept: Any) -> tuple[int, int]:
    """(order key, ties) down to which ``limit`` is kept. Entries with keys >= ``low`` reach the limit, those >= ``high`` do not.

    ``peaks`` as ``block_peaks`` gives them; ``keys`` and ``kept`` are scratch [V].
    """
    before = 0
    while high - low > 1 and _number(values, key_float(i32(low)), key_float(i32(high))) > _FEW:
        middle = (low + high) // 2
        mass = _mass(values, masses, key_float(i32(middle)))
        if mass >= limit:
            low = middle
        else:
            high, before = middle, mass
    m = _gather(values, masses, peaks, low, high, keys, kept)
    if high - low == 1:
        return low, _ties(kept, m, limit, before)
    key, ties = threshold(keys, kept, m, limit, before)
    return (key - 2147483648, ties) if key >= 0 else (low, m)


@njit("void(f4[::1],f4[::1],f4,i8)", cache=True, nogil=True)
def _keep(row: Any, values: Any, least: float, ties: int) -> None:
    """Drop from ``row`` what has a value below ``least``, and what equals it after the first ``ties``."""
    equal = i32(0)
    for i in range(len(row)):
        row[i] = row[i] if values[i] >= least else _DROPPED
        equal = i32(equal + (i32(1) if values[i] == least else i32(0)))
    if equal <= ties:
        return
    for i in range(len(row)):
        if values[i] == least:
            ties -= 1
            if ties < 0:
                row[i] = _DROPPED


@njit("i8(i4[::1],i8)", cache=True, nogil=True)
def _block_floor(peaks: Any, k: int) -> int:
    """A key that at least k entries reach: the k-th largest block peak (each block holds its own), or -inf's key if blocks are too few."""
    if k >= len(peaks):
        return np.int64(KEY_NEG_INF)
    keys, ones = np.empty(len(peaks), np.uint32), np.ones(len(peaks), np.int32)
    for b in range(len(peaks)):
        keys[b] = u32(u32(peaks[b]) ^ u32(0x80000000))
    key, _ = threshold(keys, ones, len(peaks), k, 0)
    return max(key - 2147483648, np.int64(KEY_NEG_INF))


@njit("void(f4[:,::1],i8[::1],i8[::1])", cache=True, nogil=True)
def top_k_rows(z: Any, rows: Any, ks: Any) -> None:
    """Keep the ``ks[j]`` largest entries of z[rows[j]], ties to the lower id; the rest becomes -inf."""
    v = z.shape[1]
    keys, kept, ones = np.empty(v, np.uint32), np.empty(v, np.int32), np.ones(v, np.int32)
    values = np.empty(v, np.float32)
    peaks = np.empty((v + BLOCK - 1) // BLOCK, np.int32)
    for j in range(len(rows)):
        row = z[rows[j]]
        best, _, bad = block_peaks(row, peaks)
        if bad or best <= i32(KEY_NEG_INF):
            continue  # the draw reports it
        if _number(row, f32(-3.4028235e38), f32(np.inf)) <= ks[j]:
            continue  # no more than k are left
        low = max(_block_floor(peaks, ks[j]), np.int64(KEY_NEG_INF) + 1)
        key, ties = _cut(row, ones, peaks, low, np.int64(best) + 1, ks[j], keys, kept)
        values[:] = row
        _keep(row, values, key_float(i32(key)), ties)


@njit("void(f4[:,::1],i8[::1],f4[::1])", cache=True, nogil=True)
def min_p_rows(z: Any, rows: Any, log_p: Any) -> None:
    """Drop entries whose probability is below exp(``log_p[j]``) times the largest one's."""
    peaks = np.empty((z.shape[1] + BLOCK - 1) // BLOCK, np.int32)
    for j in range(len(rows)):
        row = z[rows[j]]
        best, _, _ = block_peaks(row, peaks)
        floor = f32(key_float(best) + log_p[j])
        for i in range(len(row)):
            row[i] = row[i] if row[i] >= floor else _DROPPED


@njit("i8(f4[::1],f4,f4[::1],i4[::1])", cache=True, nogil=True, error_model="numpy")
def weigh(row: Any, best: float, weights: Any, masses: Any) -> int:
    """exp(row - best) into ``weights`` [V] and as integers (2**30 = 1) into ``masses``; returns their sum."""
    total = np.int64(0)
    for i in range(len(row)):
        e = exp_neg(f32(row[i] - best))
        weights[i] = e
        masses[i] = i32(e * f32(_UNIT))
    for i in range(len(row)):
        total += np.int64(masses[i])
    return total


@njit("void(f4[:,::1],i8[::1],f8[::1])", cache=True, nogil=True, error_model="numpy")
def top_p_rows(z: Any, rows: Any, ps: Any) -> None:
    """Keep the fewest largest entries of z[rows[j]] whose mass reaches ``ps[j]``, ties to the lower id; the rest becomes -inf."""
    v = z.shape[1]
    weights, masses = np.empty(v, np.float32), np.empty(v, np.int32)
    kept, keys = np.empty(v, np.int32), np.empty(v, np.uint32)
    peaks = np.empty((v + BLOCK - 1) // BLOCK, np.int32)
    for j in range(len(rows)):
        row = z[rows[j]]
        best, _, bad = block_peaks(row, peaks)
        if bad or best <= i32(KEY_NEG_INF):
            continue  # the draw reports it
        total = weigh(row, key_float(best), weights, masses)
        block_peaks(weights, peaks)
        # All entries below total * (1 - p) / V weigh less than 1 - p together, so none of them can be needed.
        floor = f32(np.float64(total) * (1.0 - ps[j]) / v / _UNIT * 0.99)
        limit = np.int64(np.ceil(ps[j] * np.float64(total)))
        key, ties = _cut(weights, masses, peaks, np.int64(order_key(floor)), np.int64(order_key(f32(1))) + 1, limit, keys, kept)
        _keep(row, weights, key_float(i32(key)), ties)
