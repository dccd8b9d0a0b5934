"""What one attention call has to do, as seen by its kernel: the address table, row tiles, and which keys a row sees.

Each thread makes the same list of tiles for itself (a few nanoseconds a row), so no barrier is needed before work is claimed.
"""

from __future__ import annotations

import numpy as np

from presage.kernels.cpu.cache import device, subroutine
from presage.kernels.cpu.region import HEADER
from presage.kernels.cpu.simd import get_i32, get_i64, set_i32

# Words of the table. Optional addresses are 0 when absent. Fixed for one layer, then one step, then one call.
K, V, SINKS, HEADS, KV_HEADS, DIM, WINDOW, CAUSAL, UNITS, FLOATS = range(HEADER, HEADER + 10)
ROWS, INDPTR, BLOCKS, SPAN_OF, INDEX, LINEAR, KV_LEN, TREE, POSITION, WORDS, MAX_KV = range(HEADER + 10, HEADER + 21)
Q, OUT, QUERY_HALF, OUT_HALF, SCRATCH, SCRATCH_BYTES = range(HEADER + 21, HEADER + 27)
FIELDS = 27

BLOCK = 32
MAX_TILE = 64
"""Query rows (tokens x heads of the group) of one tile: enough reuse of a block in L1 to be bound by arithmetic."""
L2_SCORES = 512 * 1024
"""Scores of a tile are kept within this many bytes where a smaller tile can do it."""

LEAST = np.float32(1e-30)
"""An int8 row whose largest magnitude is below this becomes zero: the reciprocal of its scale would overflow."""

_WORD = np.uint64(0xFFFFFFFF)


@device
def clamp(x, high):  # type: ignore[no-untyped-def]
    """x within 0..high (numba's own min and max take long to compile)."""
    x = x if x > 0 else 0
    return x if x < high else high


@device
def tile_tokens(group, kv_len, room):  # type: ignore[no-untyped-def]
    """Tokens per row tile for a span of ``kv_len`` keys: as many as fit, halved when their scores leave the second-level cache."""
    row_bytes = (kv_len + 2 * BLOCK) * 4
    rows = MAX_TILE if MAX_TILE * row_bytes <= L2_SCORES else MAX_TILE // 2
    tokens, fitting = rows // group, room // (row_bytes * group)
    tokens = fitting if fitting < tokens else tokens
    return tokens if tokens > 1 else 1


@subroutine
def plan_tiles(table, plan, room):  # type: ignore[no-untyped-def]
    """Write tiles (first row, rows) at ``plan``, longest first; returns how many.

    A tile is a run of rows of one span. Costs are sorted by their power of two: exact order would not change the finish by more.
    """
    rows, group = get_i64(table, ROWS), get_i64(table, HEADS) // get_i64(table, KV_HEADS)
    span_of, index, kv_lens = get_i64(table, SPAN_OF), get_i64(table, INDEX), get_i64(table, KV_LEN)
    raw, cost, counts = plan + 8 * rows, plan + 16 * rows, plan + 20 * rows
    for i in range(64):
        set_i32(counts, i, 0)
    tiles = r = 0
    while r < rows:
        span = get_i32(span_of, r)
        kv_len = get_i32(kv_lens, span)
        most, n = tile_tokens(group, kv_len, room), 1
        while n < most and r + n < rows and get_i32(span_of, r + n) == span:
            n += 1
        last, bucket = get_i32(index, r + n - 1), 63
        work = n * group * (1 + (last if last < kv_len else kv_len))
        while work > 1:
            work >>= 1
            bucket -= 1
        set_i32(raw, 2 * tiles, r)
        set_i32(raw, 2 * tiles + 1, n)
        set_i32(cost, tiles, bucket)
        set_i32(counts, bucket, get_i32(counts, bucket) + 1)
        tiles += 1
        r += n
    _scatter(tiles, plan, raw, cost, counts)
    return tiles


@device
def _scatter(tiles, plan, raw, cost, counts):  # type: ignore[no-untyped-def]
    """Counting sort of the tiles by bucket."""
    start = 0
    for i in range(64):
        n = get_i32(counts, i)
        set_i32(counts, i, start)
        start += n
    for i in range(tiles):
        bucket = get_i32(cost, i)
        place = get_i32(counts, bucket)
        set_i32(counts, bucket, place + 1)
        set_i32(plan, 2 * place, get_i32(raw, 2 * i))
        set_i32(plan, 2 * place + 1, get_i32(raw, 2 * i + 1))


@device
def linear_range(table, row, linear):  # type: ignore[no-untyped-def]
    """Keys [first, stop) of the linear part that ``row`` sees; a tree row's window is measured from its position, not its slot."""
    index, window = get_i32(get_i64(table, INDEX), row), get_i64(table, WINDOW)
    stop = index + 1 if get_i64(table, CAUSAL) != 0 and index < linear else linear
    if window == 0:
        return 0, stop
    place, positions = index, get_i64(table, POSITION)
    if index >= linear and positions != 0:
        place = get_i32(positions, row)
    first = place - window + 1
    return clamp(first, stop), stop


@device
def tree_bits(words, count, offset):  # type: ignore[no-untyped-def]
    """32 ancestor bits from bit ``offset`` on (negative: the first bits are below the tree, hence 0)."""
    if offset < 0:
        return (np.uint64(get_i64(words, 0)) << np.uint64(-offset)) & _WORD if count > 0 else np.uint64(0)
    word, shift = offset >> 6, offset & 63
    if word >= count:
        return np.uint64(0)
    bits = np.uint64(get_i64(words, word)) >> np.uint64(shift)
    if shift > 32 and word + 1 < count:
        bits |= np.uint64(get_i64(words, word + 1)) << np.uint64(64 - shift)
    return bits & _WORD


@subroutine
def visible_bits(table, row, start, linear, kv_len):  # type: ignore[no-untyped-def]
    """Bit i: does ``row`` see key ``start`` + i (32 of them)?"""
    one = np.uint64(1)
    first, stop = linear_range(table, row, linear)
    low, high = clamp(first - start, BLOCK), clamp(stop - start, BLOCK)
    bits = ((one << np.uint64(high)) - one) & ~((one << np.uint64(low)) - one) if high > low else np.uint64(0)
    if linear < kv_len and start + BLOCK > linear:
        words = get_i64(table, WORDS)
        seen = tree_bits(get_i64(table, TREE) + 8 * words * row, words, start - linear)
        bits |= seen & ((one << np.uint64(clamp(kv_len - start, BLOCK))) - one)
    return np.int64(bits)
