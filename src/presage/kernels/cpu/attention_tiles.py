"""The attention kernel: two passes over the keys of a tile, so that the order of every sum is the order of the keys.

Pass 1 makes all scores and their exact maximum; pass 2 makes weights, their sum and the output, key after key, in one accumulator per
element. Nothing is rescaled on the way (unlike online softmax), so no bit depends on block borders, tile heights or hidden keys in between:
what a row does not see is replaced by zeros before it is multiplied. Scratch is 4 bytes per (row, key).

Scores stay in the dots' own unit; a row's *unit* (the scale of its scores, times that of its int8 query) enters with the exponential.
Weights of bf16 and int8 values are rounded to bf16 (their sum is not): then one instruction multiplies two keys, which halves the work.
Those of int8 values are multiplied by the value's scale before; the codes become bf16 without loss, once for all rows of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.kernels.cpu import attention_plan as at
from presage.kernels.cpu.attention_plan import BLOCK, MAX_TILE
from presage.kernels.cpu.cache import device, kernel, subroutine
from presage.kernels.cpu.prepare import row_limit
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
    load_i8,
    maximum,
    prefetch_l2,
    reduce_max,
    select,
    set_f32,
    set_i32,
    store_bf16,
    store_f32,
    store_i8,
    store_i32,
    zero_f32,
    zero_i32,
)
from presage.kernels.cpu.simd_attention import (
    F32,
    HEAD,
    INT8,
    mask_of,
    pair_codes,
    pair_masks,
    pair_weights,
    pv_tile,
    qk_tile,
    scalable,
    times_power,
    whole,
    word_mask,
)
from presage.kernels.cpu.simd_int import reduce_sum_i32, round_i8
from presage.kernels.cpu.simdmath import constant, tanh

AHEAD = 8192
"""Bytes between what is read and what is fetched: half of it is too near for memory's latency."""
LOG2_E = np.float32(1.44269504088896341)
NEG_INF = np.float32(-np.inf)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
QUADRUPLE = 4
"""Rows of a register tile at most."""


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
def exp2_weight(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, to 3e-6: for weights that become bf16, of which this is a five-hundredth part of the rounding. NaN stays NaN."""
    y = scalable(x)
    n = whole(y)
    r = y - n
    p = fma(constant(0.009582853169), r, constant(0.05590642504))
    p = fma(p, r, constant(0.2402409861))
    p = fma(p, r, constant(0.6931241934))
    return times_power(fma(p, r, constant(1.0)), n)


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
def _settle(scores, biggest, bits, unit, cap):  # type: ignore[no-untyped-def]
    """Cap 32 scores of one row, make hidden ones -inf and keep the lane maxima."""
    top = load_f32(biggest, 0)
    for j in range(2):
        x = load_f32(scores, 16 * j)
        if cap > ZERO:
            x = broadcast_f32(cap) * tanh(x * broadcast_f32(unit) / broadcast_f32(cap))
        x = select(mask_of(bits >> (16 * j)), x, broadcast_f32(NEG_INF))
        store_f32(scores, 16 * j, x)
        top = maximum(x, top)
    store_f32(biggest, 0, top)


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


def _key_bytes(kind: int, dim: int) -> int:
    return dim * (4 >> kind)


def _block_bytes(kind: int, dim: int) -> int:
    return BLOCK * dim * (4 >> kind) + (HEAD if kind == INT8 else 0)


key_bytes, block_bytes = device(_key_bytes), device(_block_bytes)


@device
def _row_bytes(kind, dim):  # type: ignore[no-untyped-def]
    """A packed query; an int8 one is followed by what its dots start from."""
    return dim + 64 if kind == INT8 else dim * (4 >> kind)


def _score_pass(kind: int) -> Any:
    """Pass 1 for one kind of cache."""

    @subroutine
    def run(table, row0, rows, span, head, group, packed, biggest, units, scores):  # type: ignore[no-untyped-def]
        """Scores of every block of the tile at ``scores`` [block, rows * group, 32]; lane maxima at ``biggest``."""
        low, stop, full_lo, full_hi, linear, kv_len = _bounds(table, row0, rows, span)
        cap, dim = get_f32(table, 2 * at.FLOATS + 1), get_i64(table, at.DIM)
        m, stride, size, first, last = rows * group, _row_bytes(kind, dim), block_bytes(kind, dim), low // BLOCK, (stop + BLOCK - 1) // BLOCK
        cache, step, words = get_i64(table, at.K) + head * size, get_i64(table, at.KV_HEADS) * size, key_bytes(kind, dim) // 4
        values, codes, unused = get_i64(table, at.V) + head * size, HEAD if kind == INT8 else 0, biggest + 64 * MAX_TILE
        distance = (AHEAD + size - 1) // size
        for unit in range(first, last):
            k, later = cache + _block_at(table, span, unit) * step, unit + distance
            ahead = cache + _block_at(table, span, later) * step if later < last else k
            if later >= last and first + later - last < last:
                # The last keys fetch the first values: pass 2 follows at once.
                ahead = values + _block_at(table, span, first + later - last) * step
            if kind == INT8:
                prefetch_l2(ahead, 0)
                prefetch_l2(ahead, 64)
            k, ahead, out, start, r = k + codes, ahead + codes, scores + (unit - first) * m * 128, unit * BLOCK, 0
            full, bits = start >= full_lo and start + BLOCK <= full_hi, 0xFFFFFFFF
            plain = full and not cap > ZERO
            while r < m:
                q, dots, tops = packed + r * stride, out + r * 128, biggest + 64 * r if plain else unused
                if m - r >= 4:
                    # Only the first rows fetch the next block: the others find this one in L1.
                    if r == 0:
                        qk_tile(4, kind, 1, q, stride, k, words, dots, tops, ahead)
                    else:
                        qk_tile(4, kind, 0, q, stride, k, words, dots, tops, ahead)
                    r += 4
                elif m - r >= 2:
                    qk_tile(2, kind, 1, q, stride, k, words, dots, tops, ahead)
                    r += 2
                else:
                    qk_tile(1, kind, 1, q, stride, k, words, dots, tops, ahead)
                    r += 1
            if not plain:
                for i in range(rows):
                    if not full:
                        bits = at.visible_bits(table, row0 + i, start, linear, kv_len)
                    for v in range(i * group, (i + 1) * group):
                        _settle(out + 128 * v, biggest + 64 * v, bits, get_f32(units, v), cap)

    return run


def _weigh(kind: int) -> Any:
    """Weights of one kind of cache from the scores of a block."""

    @device
    def run(scores, n, top, units, value, masked, weights, masks):  # type: ignore[no-untyped-def]
        """Scores [n, 32] become exp(unit (score - top)), hidden ones 0; ``weights`` are what values of this kind are multiplied by."""
        hidden = broadcast_f32(NEG_INF)
        for r in range(n):
            x0, x1 = load_f32(scores, 32 * r), load_f32(scores, 32 * r + 16)
            m, unit = broadcast_f32(get_f32(top, r)), broadcast_f32(get_f32(units, r))
            if kind == F32:
                p0, p1 = exp_weight((x0 - m) * unit), exp_weight((x1 - m) * unit)
            else:
                least = constant(0.0) - m * unit
                p0, p1 = exp2_weight(fma(x0, unit, least)), exp2_weight(fma(x1, unit, least))
            if masked:
                p0, p1 = select(x0 == hidden, zero_f32(), p0), select(x1 == hidden, zero_f32(), p1)
            store_f32(scores, 32 * r, p0)
            store_f32(scores, 32 * r + 16, p1)
            if kind == F32:
                if masked:
                    store_i32(masks, 32 * r, word_mask(hidden < x0))
                    store_i32(masks, 32 * r + 16, word_mask(hidden < x1))
            else:
                if kind == INT8:
                    w0, w1 = p0 * load_f32(value, 0), p1 * load_f32(value, 16)
                    if masked:
                        # A hidden value's scale may be anything.
                        w0, w1 = select(x0 == hidden, zero_f32(), w0), select(x1 == hidden, zero_f32(), w1)
                else:
                    w0, w1 = p0, p1
                store_i32(weights, 16 * r, pair_weights(w0, w1))
                if masked:
                    store_i32(masks, 16 * r, pair_masks(hidden < x0, hidden < x1))

    return run


@subroutine
def _widen(codes, dim, out, ahead):  # type: ignore[no-untyped-def]
    """An int8 block of values as bf16 pairs of keys [16, dim]; fetches the block ``ahead``."""
    target = 0
    for i in range(0, BLOCK * dim, 2 * dim):
        for line in range(i, i + 2 * dim, 64):
            prefetch_l2(ahead, line)
        for d in range(i, i + dim, 16):
            store_i32(out, target, pair_codes(load_i8(codes, d), load_i8(codes, d + dim)))
            target += 16


def _columns(kind: int) -> Any:
    """Outputs of some rows grow by a block; ``kind`` is that of the values as they are given."""
    token = 4 if kind != INT8 else 1

    @device
    def run(n, masked, reading, p, w, v, dim, acc, sums, masks, ahead, unused):  # type: ignore[no-untyped-def]
        c = 0
        while c < dim:
            # Only the first columns' call adds to the true sums.
            value, a, nxt, total = v + token * c, acc + 4 * c, ahead + token * c, sums if c == 0 else unused
            # A visible key's bits are the same in the masked form, so the small tiles have no other.
            if dim - c >= 64:
                if n == 4 and masked:
                    pv_tile(4, 4, kind, 1, 1, p, w, value, dim, a, total, masks, nxt)
                elif n == 4 and reading:
                    pv_tile(4, 4, kind, 0, 1, p, w, value, dim, a, total, masks, nxt)
                elif n == 4:
                    pv_tile(4, 4, kind, 0, 0, p, w, value, dim, a, total, masks, nxt)
                elif n == 2:
                    pv_tile(2, 4, kind, 1, 1, p, w, value, dim, a, total, masks, nxt)
                else:
                    pv_tile(1, 4, kind, 1, 1, p, w, value, dim, a, total, masks, nxt)
                c += 64
            else:
                for r in range(n):
                    row = r * (128 if kind == F32 else 64)
                    pv_tile(1, 1, kind, 1, 1, p + 128 * r, w + row, value, dim, a + 4 * dim * r, total + 4 * r, masks + row, nxt)
                c += 16

    return run


def _value_pass(kind: int) -> Any:
    """Pass 2 for one kind of cache."""
    weigh, columns, wide_columns = _weigh(kind), _columns(kind), _columns(min(kind, 1))

    @subroutine
    def run(table, row0, rows, span, head, group, top, sums, units, acc, spare, scores):  # type: ignore[no-untyped-def]
        """Weights, their sums and the weighted sum of values, key after key."""
        low, stop, full_lo, full_hi, _, _ = _bounds(table, row0, rows, span)
        dim, masks, wide, unused = get_i64(table, at.DIM), spare + 128 * QUADRUPLE, spare + 256 * QUADRUPLE, scores - 16 * MAX_TILE
        m, size, first, last = rows * group, block_bytes(kind, dim), low // BLOCK, (stop + BLOCK - 1) // BLOCK
        cache, step = get_i64(table, at.V) + head * size, get_i64(table, at.KV_HEADS) * size
        distance, widened = (AHEAD + size - 1) // size, kind == INT8 and m > QUADRUPLE
        for unit in range(first, last):
            value = cache + _block_at(table, span, unit) * step
            ahead = cache + _block_at(table, span, unit + distance) * step if unit + distance < last else value
            start, r = unit * BLOCK, 0
            masked, scales = start < full_lo or start + BLOCK > full_hi, value
            if kind == INT8:
                prefetch_l2(ahead, 0)
                prefetch_l2(ahead, 64)
                value, ahead = value + HEAD, ahead + HEAD
                if widened:
                    _widen(value, dim, wide, ahead)
            while r < m:
                n = 4 if m - r >= 4 else 2 if m - r >= 2 else 1
                p = scores + ((unit - first) * m + r) * 128
                w, a, total = p if kind == F32 else spare, acc + 4 * dim * r, sums + 4 * r
                weigh(p, n, top + 4 * r, units + 4 * r, scales, masked or n < 4 or dim % 64 != 0, w, masks)
                if kind == INT8 and widened:
                    wide_columns(n, masked, False, p, w, wide, dim, a, total, masks, wide, unused)
                else:
                    columns(n, masked, r == 0, p, w, value, dim, a, total, masks, ahead, unused)
                r += n

    return run


@device
def _query(table, source, d):  # type: ignore[no-untyped-def]
    q = get_i64(table, at.Q)
    return load_bf16(q, source + d) if get_i64(table, at.QUERY_HALF) else load_f32(q, source + d)


@subroutine
def _pack_int8(table, source, dim, target):  # type: ignore[no-untyped-def]
    """One query to int8 by its largest magnitude (see `kv_int8`); returns its scale, 1 if all are zero."""
    for d in range(0, dim, 16):
        store_f32(target, d, _query(table, source, d))
    limit = row_limit(target, 0, dim)
    factor, total = broadcast_f32(np.float32(127.0) / limit if limit >= at.LEAST else ZERO), zero_i32()
    for d in range(0, dim, 16):
        # In place: 16 codes lie below the 16 floats that are read next.
        codes = round_i8(load_f32(target, d) * factor)
        store_i8(target, d, codes)
        total = total + codes
    set_i32(target, dim // 4, -128 * reduce_sum_i32(total))
    return ONE if limit < at.LEAST else limit / np.float32(127.0)


def _open_tile(kind: int) -> Any:
    @subroutine
    def run(table, row0, rows, head, group, packed, biggest, units, acc):  # type: ignore[no-untyped-def]
        """Gather the tile's queries [rows * group, D] in the form that meets the keys; reset maxima and accumulators."""
        dim, heads, scale = get_i64(table, at.DIM), get_i64(table, at.HEADS), get_f32(table, 2 * at.FLOATS)
        for v in range(rows * group):
            source, target, unit = ((row0 + v // group) * heads + head * group + v % group) * dim, packed + v * _row_bytes(kind, dim), scale
            if kind == INT8:
                unit = scale * _pack_int8(table, source, dim, target)
            for d in range(0, dim, 16):
                if kind == F32:
                    store_f32(target, d, _query(table, source, d))
                elif kind != INT8:
                    store_bf16(target, d, _query(table, source, d))
                store_f32(acc, v * dim + d, zero_f32())
            set_f32(units, v, unit)
            store_f32(biggest, 16 * v, broadcast_f32(NEG_INF))

    return run


def _reduce_maxima(kind: int) -> Any:
    base = 1.0 if kind == F32 else float(LOG2_E)

    @subroutine
    def run(table, m, head, group, biggest, top, sums, units):  # type: ignore[no-untyped-def]
        """Each row's maximum, the first term of its sum (exp(sink - maximum), or 0), and its unit to the base of the exponential."""
        sinks, capped = get_i64(table, at.SINKS), get_f32(table, 2 * at.FLOATS + 1) > ZERO
        for v in range(m):
            high, begin = reduce_max(load_f32(biggest, 16 * v)), ZERO
            unit = ONE if capped else get_f32(units, v)
            if sinks != 0:
                sink = get_f32(sinks, head * group + v % group)
                high = high if high > sink / unit else sink / unit
                begin = reduce_max(exp_weight(broadcast_f32(sink - high * unit)))
            set_f32(top, v, high)
            set_f32(sums, v, begin)
            set_f32(units, v, unit * np.float32(base))

    return run


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
    # Rows: query, accumulator, maxima, four numbers. Once: maxima that nobody reads, weights and masks of a register tile, wide values.
    return MAX_TILE * (8 * dim + 64 + 64 + 16) + 64 * QUADRUPLE + 256 * QUADRUPLE + 2 * BLOCK * dim


plan_bytes, tile_bytes = device(_plan_bytes), device(_tile_bytes)


@kernel
def attend(kind):  # type: ignore[no-untyped-def]
    """Each thread claims (tile, KV head) items until none is left. ``kind`` of caches: 0 f32, 1 bf16, 2 int8."""
    score_pass, value_pass, open_tile, reduce_maxima = _score_pass(kind), _value_pass(kind), _open_tile(kind), _reduce_maxima(kind)

    def run(table):  # type: ignore[no-untyped-def]
        rank, kv_heads, size, dim = enter(table), get_i64(table, at.KV_HEADS), get_i64(table, at.SCRATCH_BYTES), get_i64(table, at.DIM)
        group, span_of = get_i64(table, at.HEADS) // kv_heads, get_i64(table, at.SPAN_OF)
        plan = get_i64(table, at.SCRATCH) + rank * size
        packed = plan + plan_bytes(get_i64(table, at.ROWS))
        acc = packed + MAX_TILE * (4 * dim + 64)
        biggest = acc + MAX_TILE * 4 * dim
        spare = biggest + 64 * (MAX_TILE + QUADRUPLE)
        scores = packed + tile_bytes(dim)
        top, sums, units = scores - 4 * MAX_TILE, scores - 8 * MAX_TILE, scores - 12 * MAX_TILE
        tiles = at.plan_tiles(table, plan, plan + size - scores)
        item = claim(table)
        while item < tiles * kv_heads:
            tile, head = item // kv_heads, item % kv_heads
            row0, rows = get_i32(plan, 2 * tile), get_i32(plan, 2 * tile + 1)
            span = get_i32(span_of, row0)
            open_tile(table, row0, rows, head, group, packed, biggest, units, acc)
            score_pass(table, row0, rows, span, head, group, packed, biggest, units, scores)
            reduce_maxima(table, rows * group, head, group, biggest, top, sums, units)
            value_pass(table, row0, rows, span, head, group, top, sums, units, acc, spare, scores)
            _write_out(table, row0, rows, head, group, sums, acc)
            item = claim(table)
        leave(table)

    return run
