"""Counter-based noise: a pure function of (seed, position, purpose) and the token id. Nothing is consumed, so nothing can get out of step.

Gumbel noise turns drawing into an argmax: argmax(log p + G) is distributed as p (Gumbel, 1954). Because G belongs to the id and the place,
the same target row gives the same token whatever was drafted, batched or truncated before. In the manner of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), a keyed integer hash of the counter replaces a generator with state.
"""

# mypy: disable-error-code="arg-type, return-value, misc, assignment, call-arg, var-annotated"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from presage.core.types import Floats, Ints, Longs, Singles, Words
from presage.execute.sampling.vecmath import (
    BLOCK,
    KEY_NEG_INF,
    KEY_POS_INF,
    f32,
    float_bits,
    i32,
    key_float,
    log_ratio,
    order_key,
    split,
    u32,
)

DRAW = 0
ACCEPT = 1
RESIDUAL = 2

NAN_ROW = -1
EMPTY_ROW = -2

_TOP_NOISE = 22.9  # no Gumbel value made from 31 bits is larger
_SLACK = 1e-3  # the bound of a block is rounded; the margin keeps skipping exact


@njit("u8(u8)", cache=True, nogil=True)
def splitmix(x: int) -> int:
    """One output of splitmix64 (Steele et al., OOPSLA 2014): a bijection of 64 bits with good avalanche."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit("void(u8[::1],i8[::1],i8,u8[::1])", cache=True, nogil=True)
def _stream_keys(seeds: Words, positions: Longs, purpose: int, out: Words) -> None:
    for i in range(len(seeds)):
        key = splitmix(seeds[i] ^ np.uint64(0x5851F42D4C957F2D))
        key = splitmix(key + np.uint64(positions[i]))
        out[i] = splitmix(key ^ np.uint64(purpose))


@njit(inline="always")
def _hash(token: int, k0: int, k1: int) -> int:
    x = u32(u32(u32(token) * u32(0x9E3779B9)) + k0)
    x = u32(x ^ u32(x >> u32(16)))
    x = u32(x * u32(0x21F0AAAD))
    x = u32(x ^ u32(x >> u32(15)))
    x = u32(x + k1)
    x = u32(x * u32(0x735A2D97))
    x = u32(x ^ u32(x >> u32(15)))
    x = u32(x * u32(0x846CA68B))
    return i32(u32(x ^ u32(x >> u32(16))) >> u32(1))


@njit(inline="always")
def _gumbel_of(h: int) -> float:
    """-log(-log1p(-v)) for v = (h + 1/2) / 2**31: small h is the upper tail, where v is exact in float32."""
    v = f32(f32(f32(h) + f32(0.5)) * f32(2.0**-31))
    m, k = split(f32(max(f32(f32(1) - v), f32(2.0**-24))))
    near = v < f32(0.29)  # 1 - v would round the tail away; log1p takes v itself
    m = f32(-v) if near else m
    k = f32(0) if near else k
    m2, k2 = split(f32(-log_ratio(m, k)))
    return f32(-log_ratio(m2, k2))


@njit(inline="always")
def _gumbel_bound(h: int) -> float:
    """At least ``_gumbel_of(h)``: -log1p(-v) >= v, and a float's bits, read as exponent and fraction, are at most its log2."""
    v = f32(f32(f32(h) + f32(0.5)) * f32(2.0**-31))
    return f32(f32(f32(127) - f32(f32(float_bits(v)) * f32(2.0**-23))) * f32(0.693148))


@njit("void(u8,i4[::1],f4[::1])", cache=True, nogil=True, error_model="numpy")
def _gumbel(key: int, ids: Ints, out: Singles) -> None:
    k0, k1 = u32(key & np.uint64(0xFFFFFFFF)), u32(key >> np.uint64(32))
    for i in range(len(ids)):
        out[i] = _gumbel_of(_hash(ids[i], k0, k1))


@njit(inline="always")
def _peak(row: Any, start: int, count: int) -> tuple[int, int]:
    """Largest and smallest order key of row[start : start + count]."""
    high, low = i32(-2147483648), i32(2147483647)
    for i in range(count):
        k = order_key(row[start + i])
        high = k if k > high else high
        low = k if k < low else low
    return high, low


@njit(inline="always")
def block_peaks(row: Any, peaks: Any) -> tuple[int, int, bool]:
    """Largest key of each BLOCK of the row into ``peaks``; (largest key, its first block, whether a NaN or +inf was seen)."""
    n, best, where, least = len(row), i32(KEY_NEG_INF), 0, i32(0)
    for b in range(len(peaks)):
        if b * BLOCK + BLOCK <= n:  # a constant trip count is what LLVM vectorises
            high, low = _peak(row, b * BLOCK, BLOCK)
        else:
            high, low = _peak(row, b * BLOCK, n - b * BLOCK)
        peaks[b] = high
        least = min(least, low)
        if high > best:
            best, where = high, b
    return best, where, best >= i32(KEY_POS_INF) or least < i32(KEY_NEG_INF)


@njit(inline="always")
def _first_of(row: Any, block: int, peak: int) -> int:
    for i in range(block * BLOCK, min(len(row), block * BLOCK + BLOCK)):
        if order_key(row[i]) == peak:
            return i
    return NAN_ROW


@njit(inline="always")
def _hashes(start: int, count: int, k0: int, k1: int, out: Any) -> int:
    """Hashes of ``count`` ids from ``start``; returns the smallest, which has the largest noise."""
    least = i32(0x7FFFFFFF)
    for i in range(count):
        h = _hash(u32(start + i), k0, k1)
        out[i] = h
        least = h if h < least else least
    return least


@njit(inline="always")
def _scores(row: Any, start: int, count: int, inv: float, hashes: Any, out: Any) -> int:
    """Scores of a block into ``out``; returns the largest order key."""
    peak = i32(-2147483648)
    for i in range(count):
        s = f32(f32(row[start + i] * inv) + _gumbel_of(hashes[i]))
        out[i] = s
        k = order_key(s)
        peak = k if k > peak else peak
    return peak


@njit(inline="always")
def _block_best(row: Any, start: int, inv: float, hashes: Any, scores: Any) -> tuple[float, int]:
    """Largest score of a block and the lowest id that has it."""
    count = min(BLOCK, len(row) - start)
    peak = _scores(row, start, BLOCK, inv, hashes, scores) if count == BLOCK else _scores(row, start, count, inv, hashes, scores)
    for i in range(count):
        if order_key(scores[i]) == peak:
            return scores[i], start + i
    return f32(-np.inf), NAN_ROW


@njit("i4(f4[::1],f4,u8,i4[::1],i8,i4[::1],f4[::1])", cache=True, nogil=True, error_model="numpy")
def _draw_row(row: Any, inv: float, key: int, peaks: Any, top: int, hashes: Any, scores: Any) -> int:
    """argmax(row * inv + G). Blocks whose best logit plus best noise cannot win are skipped, which never changes the answer."""
    n = len(row)
    k0, k1 = u32(key & np.uint64(0xFFFFFFFF)), u32(key >> np.uint64(32))
    _hashes(top * BLOCK, min(BLOCK, n - top * BLOCK), k0, k1, hashes)
    best, token = _block_best(row, top * BLOCK, inv, hashes, scores)  # the likely winner first: it lets most others be skipped
    for b in range(len(peaks)):
        peak = f32(key_float(peaks[b]) * inv)
        if b == top or peaks[b] <= i32(KEY_NEG_INF) or peak + f32(_TOP_NOISE) < best:
            continue
        start, count = b * BLOCK, min(BLOCK, n - b * BLOCK)
        least = _hashes(start, BLOCK, k0, k1, hashes) if count == BLOCK else _hashes(start, count, k0, k1, hashes)
        if f32(peak + _gumbel_bound(least)) + f32(_SLACK) < best:
            continue
        score, i = _block_best(row, start, inv, hashes, scores)
        if score > best or (score == best and i < token):
            best, token = score, i
    return i32(token)


@njit("void(f4[:,::1],i8[::1],b1[::1],f4[::1],u8[::1],i4[::1])", cache=True, nogil=True, error_model="numpy")
def draw_rows(logits: Any, rows: Any, greedy: Any, inv: Any, keys: Any, out: Any) -> None:
    """One id per entry of ``rows`` [n]: the argmax, or where not ``greedy`` argmax(logit * inv + Gumbel(keys)). Ties to the lower id.

    NAN_ROW where a logit is NaN or +inf, EMPTY_ROW where every logit is -inf.
    """
    peaks = np.empty((logits.shape[1] + BLOCK - 1) // BLOCK, np.int32)
    hashes, scores = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
    for j in range(len(rows)):
        row = logits[rows[j]]
        best, top, bad = block_peaks(row, peaks)
        if bad:
            out[j] = NAN_ROW
        elif best <= i32(KEY_NEG_INF):
            out[j] = EMPTY_ROW
        elif greedy[j]:
            out[j] = _first_of(row, top, best)
        else:
            out[j] = _draw_row(row, inv[j], keys[j], peaks, top, hashes, scores)


def stream_keys(seeds: Words, positions: Longs, purpose: int = DRAW, index: int = 0) -> Words:
    """Keys uint64 [n] of the noise streams of (seed, position, purpose, index)."""
    out = np.empty(len(seeds), np.uint64)
    _stream_keys(seeds, positions, purpose + 8 * index, out)
    return out


def mix_seed(seed: int, branch: int) -> int:
    """Seed of a branch of a request: far from the seed itself and from other branches'."""
    return int(splitmix(np.uint64(seed ^ (branch << 32))))


def gumbel(key: int, ids: Ints) -> Singles:
    """Gumbel(0, 1) noise float32 [n] of the ids under one key; each value depends on (key, id) alone."""
    out = np.empty(len(ids), np.float32)
    _gumbel(np.uint64(key), np.ascontiguousarray(ids, np.int32), out)
    return out


@dataclass(slots=True, frozen=True)
class Noise:
    """The noise of a step's spans: ``seeds`` uint64 [S], ``base`` int64 [S] = index of the token that the last known row decides.

    Tokens of draft nodes lie ``depth`` further on. Purposes keep accept coins, residual draws and ordinary draws apart.
    """

    seeds: Words
    base: Longs

    def keys(self, spans: Ints, depth: Ints, purpose: int = DRAW, index: int = 0) -> Words:
        """Stream keys uint64 [n] of (span, depth) pairs."""
        return stream_keys(self.seeds[spans], self.base[spans] + depth, purpose, index)

    def uniform(self, span: int, depth: int, purpose: int = ACCEPT, index: int = 0) -> float:
        """One number in [0, 1)."""
        key = self._key(span, depth, purpose, index)
        return float((key >> 11) * 2.0**-53)

    def choose(self, weights: Floats, span: int, depth: int, purpose: int = RESIDUAL) -> int:
        """An id with probability proportional to ``weights`` float64 [V] (not normalised, some positive)."""
        ids = np.flatnonzero(weights > 0).astype(np.int32)
        scores = np.log(weights[ids]) + gumbel(self._key(span, depth, purpose, 0), ids)
        return int(ids[int(np.argmax(scores))])

    def _key(self, span: int, depth: int, purpose: int, index: int) -> int:
        return int(stream_keys(self.seeds[span : span + 1], self.base[span : span + 1] + depth, purpose, index)[0])
