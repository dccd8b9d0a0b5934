"""The matrix product over packed weights: one driver for all formats, any number of rows, groups of rows per weight.

out[r, n] = epilogue(sum over k of x[r, k] * w[n, k]). Dense formats have one accumulator per output, fed in the order of k; integer sums are
exact, and their groups' scales are applied in the order of k. So an output's bits depend on its own row and column only: not on how many
rows there are, how they are tiled, or which thread ran.

A call has two phases: rows are prepared (`prepare.py`: norm, quantisation), then column blocks are handed out: a block of packed weights
streams from memory once and stays in cache for the other row tiles. A single row tile looks ahead (the hardware's own prefetch stops at
4 KB borders); where there are more, they share the fetching of the next block, so memory works all the time and not during the first tile
only. Where K is deep, panels of it keep the block small; accumulators wait in scratch, unrounded.
"""

from __future__ import annotations

from typing import Any

from presage.kernels.cpu.cache import Kernel, device, kernel, subroutine
from presage.kernels.cpu.epilogue import activate, add_bias, cap_value, put_row
from presage.kernels.cpu.layout import Layout, layout
from presage.kernels.cpu.prepare import WORDS as PREPARE_WORDS
from presage.kernels.cpu.prepare import make_prepare
from presage.kernels.cpu.region import HEADER, barrier, claim, enter, leave
from presage.kernels.cpu.simd import broadcast_f32, get_f32, get_i32, get_i64, outlined
from presage.kernels.cpu.tiles import make_odd_word, make_start, make_tile, make_value

CHUNK_ROWS = 256
"""Rows whose accumulators are in scratch at once."""
PANEL_BYTES = 1 << 16
"""Bytes of a plane per panel: three planes of it are 192 KB, which stays in the L2 beside the rows."""
WHOLE_BYTES = 1 << 17
"""Up to this many bytes a plane is taken in one piece."""
WORDS = 24 + PREPARE_WORDS
(
    WEIGHTS,
    GROUPS,
    OFFSETS,
    X,
    X_STRIDE,
    UNITS,
    ODD,
    BLOCKS,
    N,
    GATED,
    SCRATCH,
    SCRATCH_STRIDE,
    OUT,
    OUT_STRIDE,
    MODE,
    BIAS,
    BIAS_STRIDE,
    ROW_SCALE,
    ACT,
    CAPPED,
    CAP,
    LINES,
    META,
    SCALES,
    PREPARE,
) = range(HEADER, HEADER + 25)
"""X: rows as tiles read them. UNITS of K, ODD: a last half word (bf16). LINES of codes per group. META: where in a prepared row its scale and
sums are. SCALES: where in a weight its outputs' scales are. PREPARE: the words of `prepare.py` (SOURCE 0: X is given)."""


def scratch_bytes(columns: int) -> int:
    """Scratch per thread: the accumulators of a chunk of rows, and a vector beyond so that whole vectors can be read."""
    return CHUNK_ROWS * columns * 4 + 64


def make_panel(form: Layout) -> Any:
    """A device function that runs row tiles of the format's rows, then 4, 2 and 1 rows over one panel of one column block."""
    rows, row_bytes = form.rows, form.columns * 4
    tiles = {n: make_tile(form, n) for n in {1, 2, min(4, rows), rows}}
    big, four, two, one = tiles[rows], tiles[min(4, rows)], tiles[2], tiles[1]

    @device
    def tiles_of(count):  # type: ignore[no-untyped-def]
        left = count % rows
        return count // rows + (left >> 2 & 1) + (left >> 1 & 1) + (left & 1)

    @device
    def panel(weights, plane, x, sums, stride, acc, count, units, lines, follow, reach):  # type: ignore[no-untyped-def]
        turns = tiles_of(count)
        ahead, turn, r = reach, 0, 0
        if turns == 1:
            follow = ahead
        while r < count:
            left = count - r
            at, total, part = x + r * stride, acc + r * row_bytes, sums + r * stride
            if left >= rows:
                big(weights, plane, at, part, stride, total, units, lines, ahead, follow, turn, turns)
                r += rows
            elif left >= 4:
                four(weights, plane, at, part, stride, total, units, lines, ahead, follow, turn, turns)
                r += 4
            elif left >= 2:
                two(weights, plane, at, part, stride, total, units, lines, ahead, follow, turn, turns)
                r += 2
            else:
                one(weights, plane, at, part, stride, total, units, lines, ahead, follow, turn, turns)
                r += 1
            ahead = 0
            turn += 1

    return panel, tiles_of


def make_finish(form: Layout) -> Any:
    """A device function that takes one row's accumulators of one block through the epilogue."""
    columns, half, value_of = form.columns, form.columns // 2, make_value(form)

    @device
    def finish(table, acc, row, group, block):  # type: ignore[no-untyped-def]
        scales = get_i64(get_i64(table, WEIGHTS), group) + get_i64(table, SCALES) + block * columns * 4
        meta = get_i64(table, X) + row * get_i64(table, X_STRIDE) + get_i64(table, META)
        n, gated, bias = get_i64(table, N), get_i64(table, GATED), get_i64(table, BIAS)
        if bias != 0:
            bias += group * get_i64(table, BIAS_STRIDE)
        width = half if gated else columns
        start = block * width
        act, scale = get_i64(table, ACT), get_i64(table, ROW_SCALE)
        for j in range(0, width, 16):
            count = min(16, width - j, n - start - j)
            if count > 0:
                value = add_bias(value_of(acc, j, scales, meta), bias, start + j, count)
                if get_i64(table, CAPPED):
                    value = cap_value(value, get_f32(table, 2 * CAP))
                if act != 0:
                    value = activate(act, value)
                if gated:
                    value = value * add_bias(value_of(acc, half + j, scales, meta), bias, n + start + j, count)
                if scale != 0:
                    value = value * broadcast_f32(get_f32(scale, row))
                put_row(get_i64(table, OUT), row * get_i64(table, OUT_STRIDE) + start + j, value, count, get_i64(table, MODE))

    return finish


def make_chunk(form: Layout) -> Any:
    """A function for one column block and up to CHUNK_ROWS rows: all of K, then the epilogue."""
    vectors, line, unit_bytes, x_bytes, unit_sums = form.vectors, form.columns * 4, form.unit_bytes, form.x_bytes, form.groups * 4
    reach = form.ahead
    tail = -(-reach // unit_bytes)
    whole_units, panel_units = WHOLE_BYTES // unit_bytes, max(1, PANEL_BYTES // unit_bytes)
    (panel, tiles_of), odd_word, start_row, finish = make_panel(form), make_odd_word(form), make_start(form), make_finish(form)
    dense = not form.filled

    @subroutine
    def chunk(table, acc, group, block, row, stop, following):  # type: ignore[no-untyped-def]
        outlined()
        units, lines, stride = get_i64(table, UNITS), get_i64(table, LINES), get_i64(table, X_STRIDE)
        odd = get_i64(table, ODD) if dense else 0
        x = get_i64(table, X) + row * stride
        sums = x + get_i64(table, META) + 64
        plane = units * unit_bytes + odd * 64
        weights = get_i64(get_i64(table, WEIGHTS), group) + block * vectors * plane
        piece = units if units <= whole_units else panel_units
        for i in range(stop - row):
            start_row(acc + i * line, sums + i * stride - 64)
        start = 0
        while start < units:
            length = min(piece, units - start)
            at, place, part = weights + start * unit_bytes, x + start * x_bytes, sums + start * unit_sums
            follow = length * unit_bytes
            if start + length == units:
                follow = following - at if following != 0 else 0
            if follow != 0 and start + length == units and length > tail and tiles_of(stop - row) == 1:
                # A lone tile would look past the block's end here; it looks at the beginning of the next block instead.
                head = length - tail
                panel(at, plane, place, part, stride, acc, stop - row, head, lines, 0, reach)
                at, place, part = at + head * unit_bytes, place + head * x_bytes, part + head * unit_sums
                panel(at, plane, place, part, stride, acc, stop - row, tail, lines, 0, following - at)
            else:
                panel(at, plane, place, part, stride, acc, stop - row, length, lines, follow, reach)
            start += length
        if odd:
            odd_word(weights + units * unit_bytes, plane, x + units * 4, stride, acc, stop - row)
        for r in range(row, stop):
            finish(table, acc + (r - row) * line, r, group, block)

    return chunk


@kernel
def gemm(fmt: str) -> Any:
    """The product for one weight format."""
    form = layout(fmt)
    chunk, prepare, unit_bytes, vectors = make_chunk(form), make_prepare(form, PREPARE, X, META, SCRATCH), form.unit_bytes, form.vectors

    @device
    def address(table, item):  # type: ignore[no-untyped-def]
        """Where the weights of an item start; 0 if there is no such item or it has no rows."""
        blocks, offsets = get_i64(table, BLOCKS), get_i64(table, OFFSETS)
        group = item // blocks
        if group >= get_i64(table, GROUPS) or get_i32(offsets, group) == get_i32(offsets, group + 1):
            return 0
        size = (get_i64(table, UNITS) * unit_bytes + get_i64(table, ODD) * 64) * vectors
        return get_i64(get_i64(table, WEIGHTS), group) + item % blocks * size

    def run(table):  # type: ignore[no-untyped-def]
        rank = enter(table)
        if get_i64(table, PREPARE) != 0:
            prepare(table, rank)
            barrier(table)
        acc = get_i64(table, SCRATCH) + rank * get_i64(table, SCRATCH_STRIDE)
        blocks, offsets = get_i64(table, BLOCKS), get_i64(table, OFFSETS)
        items = blocks * get_i64(table, GROUPS)
        item = claim(table)
        while item < items:
            # Claimed one ahead, so that the later row tiles can fetch what the next item reads first.
            following = claim(table)
            group = item // blocks
            row, end = get_i32(offsets, group), get_i32(offsets, group + 1)
            while row < end:
                stop = min(row + CHUNK_ROWS, end)
                chunk(table, acc, group, item - group * blocks, row, stop, address(table, following))
                row = stop
            item = following
        leave(table)

    return run


def warm_kernels() -> list[Kernel]:
    """The common matrix products."""
    return [gemm(fmt) for fmt in ("bf16", "f32", "w8", "w4g128s-bf16")]
