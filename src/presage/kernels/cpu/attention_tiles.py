"""The attention kernel: two passes over the keys of a tile, so that the order of every sum is the order of the keys.

Pass 1 makes all scores and their exact maximum; pass 2 makes weights, their sum and the output, key after key, in one accumulator per
element. Nothing is rescaled on the way (unlike online softmax), so no bit depends on block borders, tile heights or hidden keys in between:
a key that a row does not see is skipped by a select, never multiplied by zero. Scratch is 4 bytes per (row, key).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.kernels.cpu import attention_plan as at
from presage.kernels.cpu.attention_plan import BLOCK, MAX_TILE
from presage.kernels.cpu.cache import device, kernel, subroutine
from presage.kernels.cpu.region import claim, enter, leave
from presage.kernels.cpu.simd import (
    broadcast_f32,
    broadcast_i32,
    float_bits,
    fma,
    get_f32,
    get_i32,
    get_i64,
    int_bits,
    load_bf16,
    load_f32,
    maximum,
    reduce_max,
    select,
    set_f32,
    store_bf16,
    store_f32,
    zero_f32,
)
from presage.kernels.cpu.simd_attention import HIDDEN, mask_of, pv_tile, qk_tile
from presage.kernels.cpu.simdmath import constant, tanh

AHEAD = 2
"""Blocks (4 KB pieces of one head at D = 64) between the one read and the one fetched: one is too near for memory's latency."""
NEG_INF = np.float32(-np.inf)
ZERO = np.float32(0.0)
HIDE = np.float32(HIDDEN)


@device
def exp_weight(x):  # type: ignore[no-untyped-def]
    """e**x for x <= 0, to 1 ulp, exactly 0 below -87, NaN stays NaN: half the instructions of the general `exp`."""
    y = maximum(constant(-87.0), x)
    shifted = fma(y, constant(1.44269504088896341), constant(12582912.0))
    n = shifted - constant(12582912.0)
    r = fma(n, constant(-0.693145751953125), y)
    r = fma(n, constant(-1.42860677044e-6), r)
    p = fma(constant(0.001395048825), r, constant(0.008368887796))
    p = fma(p, r, constant(0.04166620585))
    p = fma(p, r, constant(0.1666651885))
    p = fma(p, r, constant(0.5000000095))
    p = fma(p * r, r, r) + constant(1.0)
    power = float_bits((int_bits(shifted) << broadcast_i32(23)) + broadcast_i32(0x3F800000))
    return select(x < constant(-87.0), constant(0.0), p * power)


@device
def _block_at(table, span, unit):  # type: ignore[no-untyped-def]
    """Index of the 32-token block ``unit`` of a span; a table entry may hold several of them."""
    units = get_i64(table, at.UNITS)
    start = get_i32(get_i64(table, at.INDPTR), span)
    blocks = get_i64(table, at.BLOCKS)
    if units == 1:
        return get_i32(blocks, start + unit)
    return get_i32(blocks, start + unit // units) * units + unit % units


@device
def _settle(scores, biggest, bits, scale, cap):  # type: ignore[no-untyped-def]
    """Turn 32 dots of one row into scores (scaled, capped, hidden ones -inf) and keep the lane maxima."""
    top = load_f32(biggest, 0)
    for j in range(2):
        x = load_f32(scores, 16 * j) * broadcast_f32(scale)
        if cap > ZERO:
            x = broadcast_f32(cap) * tanh(x / broadcast_f32(cap))
        x = select(mask_of(bits >> (16 * j)), x, broadcast_f32(NEG_INF))
        store_f32(scores, 16 * j, x)
        top = maximum(x, top)
    store_f32(biggest, 0, top)


@device
def _weigh(scores, top, rows, masked):  # type: ignore[no-untyped-def]
    """Scores [rows, 32] become exp(score - top of the row); hidden ones become HIDDEN."""
    for r in range(rows):
        m = broadcast_f32(get_f32(top, r))
        for j in range(2):
            x = load_f32(scores, 32 * r + 16 * j)
            p = exp_weight(x - m)
            if masked:
                p = select(x == broadcast_f32(NEG_INF), broadcast_f32(HIDE), p)
            store_f32(scores, 32 * r + 16 * j, p)


@subroutine
def _bounds(table, row0, rows, span):  # type: ignore[no-untyped-def]
    """(first key any row sees, one past the last, full_lo, full_hi: all rows see the keys between, linear, kv_len)."""
    kv_len = get_i32(get_i64(table, at.KV_LEN), span)
    linear = kv_len
    if get_i64(table, at.TREE) != 0 and get_i64(table, at.CAUSAL) != 0:
        linear = at.clamp(get_i32(get_i64(table, at.LINEAR), span), kv_len)
    low, stop, full_lo, full_hi = kv_len, 0, 0, kv_len
    for r in range(row0, row0 + rows):
        first, last = at.linear_range(table, r, linear)
        low = first if first < low else low
        full_lo = first if first > full_lo else full_lo
        stop = last if last > stop else stop
        full_hi = last if last < full_hi else full_hi
    return low, (kv_len if linear < kv_len else stop), full_lo, full_hi, linear, kv_len


def _score_pass(half: int) -> Any:
    """Pass 1 for bf16 (``half`` 1) or f32 caches."""
    size = 4 - 2 * half

    @subroutine
    def run(table, row0, rows, span, head, group, packed, biggest, scores):  # type: ignore[no-untyped-def]
        """Scores of every block of the tile at ``scores`` [block, rows * group, 32]; lane maxima at ``biggest``."""
        low, stop, full_lo, full_hi, linear, kv_len = _bounds(table, row0, rows, span)
        scale, cap, dim = get_f32(table, 2 * at.FLOATS), get_f32(table, 2 * at.FLOATS + 1), get_i64(table, at.DIM)
        m, stride, block_bytes, first, last = rows * group, dim * size, BLOCK * dim * size, low // BLOCK, (stop + BLOCK - 1) // BLOCK
        cache, step = get_i64(table, at.K) + head * block_bytes, get_i64(table, at.KV_HEADS) * block_bytes
        values = get_i64(table, at.V) + head * block_bytes
        for unit in range(first, last):
            k = cache + _block_at(table, span, unit) * step
            ahead = cache + _block_at(table, span, unit + AHEAD) * step if unit + AHEAD < last else k
            if unit + AHEAD >= last and first + unit + AHEAD - last < last:
                # The last keys fetch the first values: pass 2 follows at once.
                ahead = values + _block_at(table, span, first + unit + AHEAD - last) * step
            out, start, r = scores + (unit - first) * m * 128, unit * BLOCK, 0
            while r < m:
                # Only the first rows fetch the next block: the others find this one in L1.
                nxt, q, dots = ahead if r == 0 else k, packed + r * stride, out + r * 128
                if m - r >= 4:
                    qk_tile(4, half, q, stride, k, stride // 4, dots, nxt)
                    r += 4
                elif m - r >= 2:
                    qk_tile(2, half, q, stride, k, stride // 4, dots, nxt)
                    r += 2
                else:
                    qk_tile(1, half, q, stride, k, stride // 4, dots, nxt)
                    r += 1
            full, bits = start >= full_lo and start + BLOCK <= full_hi, 0xFFFFFFFF
            for i in range(rows):
                if not full:
                    bits = at.visible_bits(table, row0 + i, start, linear, kv_len)
                for v in range(i * group, (i + 1) * group):
                    _settle(out + 128 * v, biggest + 64 * v, bits, scale, cap)

    return run


def _value_pass(half: int) -> Any:
    """Pass 2 for bf16 (``half`` 1) or f32 caches."""
    size = 4 - 2 * half

    @subroutine
    def run(table, row0, rows, span, head, group, top, sums, acc, scores):  # type: ignore[no-untyped-def]
        """Weights, their sums and the weighted sum of values, key after key."""
        low, stop, full_lo, full_hi, _, _ = _bounds(table, row0, rows, span)
        dim = get_i64(table, at.DIM)
        m, stride, block_bytes, first, last = rows * group, dim * size, BLOCK * dim * size, low // BLOCK, (stop + BLOCK - 1) // BLOCK
        cache, step = get_i64(table, at.V) + head * block_bytes, get_i64(table, at.KV_HEADS) * block_bytes
        for unit in range(first, last):
            value = cache + _block_at(table, span, unit) * step
            ahead = cache + _block_at(table, span, unit + AHEAD) * step if unit + AHEAD < last else value
            start, r = unit * BLOCK, 0
            masked, keys = start < full_lo or start + BLOCK > full_hi, at.clamp(stop - start, BLOCK)
            while r < m:
                n = 4 if m - r >= 4 else 2 if m - r >= 2 else 1
                p, nxt, target, c = scores + ((unit - first) * m + r) * 128, ahead if r == 0 else value, acc + 4 * dim * r, 0
                _weigh(p, top + 4 * r, n, masked)
                while c < dim:
                    # Only the first columns' call adds to the true sums.
                    total = sums + 4 * r if c == 0 else sums + 4 * MAX_TILE
                    v, ahead_v, a, wide = value + size * c, nxt + size * c, target + 4 * c, dim - c >= 64
                    # A visible key's bits are the same in the masked form, so the small tiles have no other.
                    if wide and n == 4 and not masked:
                        pv_tile(4, 4, half, 0, p, v, stride, keys, a, 4 * dim, total, ahead_v)
                    elif wide and n == 4:
                        pv_tile(4, 4, half, 1, p, v, stride, keys, a, 4 * dim, total, ahead_v)
                    elif wide and n == 2:
                        pv_tile(2, 4, half, 1, p, v, stride, keys, a, 4 * dim, total, ahead_v)
                    elif wide:
                        pv_tile(1, 4, half, 1, p, v, stride, keys, a, 4 * dim, total, ahead_v)
                    elif n == 4:
                        pv_tile(4, 1, half, 1, p, v, stride, keys, a, 4 * dim, total, ahead_v)
                    else:
                        for i in range(n):
                            pv_tile(1, 1, half, 1, p + 128 * i, v, stride, keys, a + 4 * dim * i, 4 * dim, total + 4 * i, ahead_v)
                    c += 64 if wide else 16
                r += n

    return run


@subroutine
def _open_tile(table, row0, rows, head, group, packed, biggest, acc, half):  # type: ignore[no-untyped-def]
    """Gather the tile's queries [rows * group, D] in the cache's type; reset maxima (to the sinks, if any) and accumulators."""
    q, dim, heads, sinks = get_i64(table, at.Q), get_i64(table, at.DIM), get_i64(table, at.HEADS), get_i64(table, at.SINKS)
    query_half = get_i64(table, at.QUERY_HALF)
    for i in range(rows):
        source, target = ((row0 + i) * heads + head * group) * dim, i * group * dim
        for d in range(0, group * dim, 16):
            x = load_bf16(q, source + d) if query_half else load_f32(q, source + d)
            if half:
                store_bf16(packed, target + d, x)
            else:
                store_f32(packed, target + d, x)
            store_f32(acc, target + d, zero_f32())
        for g in range(group):
            start = get_f32(sinks, head * group + g) if sinks != 0 else NEG_INF
            store_f32(biggest, 16 * (i * group + g), broadcast_f32(start))


@subroutine
def _reduce_maxima(table, m, head, group, biggest, top, sums):  # type: ignore[no-untyped-def]
    """Each row's maximum, and the first term of its sum: exp(sink - maximum), or 0."""
    sinks = get_i64(table, at.SINKS)
    for v in range(m):
        high = reduce_max(load_f32(biggest, 16 * v))
        begin = ZERO
        if sinks != 0:
            begin = reduce_max(exp_weight(broadcast_f32(get_f32(sinks, head * group + v % group) - high)))
        set_f32(top, v, high)
        set_f32(sums, v, begin)


@subroutine
def _write_out(table, row0, rows, head, group, sums, acc):  # type: ignore[no-untyped-def]
    """out = acc / sum; a row that sees nothing gives zeros."""
    dim, heads, out, half = get_i64(table, at.DIM), get_i64(table, at.HEADS), get_i64(table, at.OUT), get_i64(table, at.OUT_HALF)
    for v in range(rows * group):
        total = get_f32(sums, v)
        divisor = broadcast_f32(total if total != ZERO else np.float32(1.0))
        target = ((row0 + v // group) * heads + head * group + v % group) * dim
        for d in range(0, dim, 16):
            y = load_f32(acc, v * dim + d) / divisor
            if half:
                store_bf16(out, target + d, y)
            else:
                store_f32(out, target + d, y)


def scratch_bytes(rows: int, dim: int, group: int, max_kv: int) -> int:
    """Bytes one thread needs: plan, packed queries, accumulators, maxima, sums, and scores of a tile (one token at least)."""
    row = 4 * (max_kv + 2 * BLOCK)
    most = min(MAX_TILE * row, at.L2_SCORES)
    return (_plan_bytes(rows) + _tile_bytes(dim) + (most if most > group * row else group * row) + 63) & -64


def _plan_bytes(rows: int) -> int:
    return (20 * rows + 256 + 63) & -64


def _tile_bytes(dim: int) -> int:
    return MAX_TILE * (8 * dim + 128)


plan_bytes, tile_bytes = device(_plan_bytes), device(_tile_bytes)


@kernel
def attend(half):  # type: ignore[no-untyped-def]
    """Each thread claims (tile, KV head) items until none is left. ``half``: 1 for bf16 caches, 0 for f32."""
    score_pass, value_pass = _score_pass(half), _value_pass(half)

    def run(table):  # type: ignore[no-untyped-def]
        rank, kv_heads, size, dim = enter(table), get_i64(table, at.KV_HEADS), get_i64(table, at.SCRATCH_BYTES), get_i64(table, at.DIM)
        group, span_of = get_i64(table, at.HEADS) // kv_heads, get_i64(table, at.SPAN_OF)
        plan = get_i64(table, at.SCRATCH) + rank * size
        packed = plan + plan_bytes(get_i64(table, at.ROWS))
        acc = packed + 4 * MAX_TILE * dim
        biggest = acc + 4 * MAX_TILE * dim
        top, sums = biggest + 64 * MAX_TILE, biggest + 68 * MAX_TILE
        scores = packed + tile_bytes(dim)
        tiles = at.plan_tiles(table, plan, plan + size - scores)
        item = claim(table)
        while item < tiles * kv_heads:
            tile, head = item // kv_heads, item % kv_heads
            row0, rows = get_i32(plan, 2 * tile), get_i32(plan, 2 * tile + 1)
            span = get_i32(span_of, row0)
            _open_tile(table, row0, rows, head, group, packed, biggest, acc, half)
            score_pass(table, row0, rows, span, head, group, packed, biggest, scores)
            _reduce_maxima(table, rows * group, head, group, biggest, top, sums)
            value_pass(table, row0, rows, span, head, group, top, sums, acc, scores)
            _write_out(table, row0, rows, head, group, sums, acc)
            item = claim(table)
        leave(table)

    return run
