"""The dense matrix product over packed weights: one source for f32 and bf16, any number of rows, groups of rows per weight.

out[r, n] = epilogue(sum over k, ascending, of x[r, k] * w[n, k]). Each output has one accumulator, fed in the order of k, so
its bits depend on its own row and column only: not on how many rows there are, how they are tiled, or which thread ran.

Work is handed out by column block (`pack.py`): a block of packed weights streams from memory once and stays in cache for the
other row tiles. A single row tile looks ahead (the hardware's own prefetch stops at 4 KB borders); where there are more,
they share the fetching of the next block, so memory works all the time and not during the first tile only. Where K is deep,
panels of it keep the block small; accumulators wait in scratch, unrounded.
"""

from __future__ import annotations

from typing import Any

from presage.kernels.cpu.cache import Kernel, device, kernel, subroutine
from presage.kernels.cpu.epilogue import activate, add_bias, cap_value, put_row
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.region import HEADER, claim, enter, leave
from presage.kernels.cpu.simd import (
    broadcast_f32,
    broadcast_i32,
    dot_bf16,
    fma,
    get,
    get_f32,
    get_i32,
    get_i64,
    get_u16,
    load_f32,
    load_i32,
    outlined,
    prefetch_l2,
    put,
    registers_f32,
    registers_i32,
    splat_load_f32,
    splat_load_i32,
    store_f32,
    zero_f32,
)

CHUNK_ROWS = 256
"""Rows whose accumulators are in scratch at once."""
PANEL_WORDS = 1024
"""Words of K (4 bytes: 2 bf16 or 1 f32) per panel: 48 columns of it are 192 KB, which stays in the L2 beside the rows."""
WHOLE_WORDS = 2048
"""Up to this many words a block is taken in one piece."""
AHEAD = 2048
"""Bytes a lone row tile looks ahead in each plane: 32 words of K, three planes at once (measured best of 512 to 8192 on Zen 4)."""

WORDS = 21
(
    WEIGHTS,
    GROUPS,
    OFFSETS,
    X,
    X_STRIDE,
    STEPS,
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
) = range(HEADER, HEADER + WORDS)


def scratch_bytes(columns: int) -> int:
    """Scratch per thread: the accumulators of a chunk of rows, and a vector beyond so that whole vectors can be read."""
    return CHUNK_ROWS * columns * 4 + 64


@device
def _dot(acc, x, w):  # type: ignore[no-untyped-def]
    return dot_bf16(acc, x, w)


@device
def _multiply_add(acc, x, w):  # type: ignore[no-untyped-def]
    return fma(x, w, acc)


@device
def _odd_pair(x, step):  # type: ignore[no-untyped-def]
    return broadcast_i32(get_u16(x, 2 * step))


@device
def _no_pair(x, step):  # type: ignore[no-untyped-def]
    return zero_f32()


def _operations(fmt: str) -> tuple[Any, Any, Any, Any, Any]:
    """(load 16 columns, repeat one word of x, multiply and add, registers for weights, last word of an odd row)."""
    if fmt == "bf16":
        return load_i32, splat_load_i32, _dot, registers_i32, _odd_pair
    return load_f32, splat_load_f32, _multiply_add, registers_f32, _no_pair


def make_tile(fmt: str, rows: int, vectors: int) -> Any:
    """A function that adds `steps` words of K to a tile of rows x (vectors * 16) accumulators held in registers."""
    load, repeat, combine, registers, _ = _operations(fmt)
    count = rows * vectors

    @subroutine
    def tile(weights, plane, x, stride, acc, steps, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        outlined()
        sums = registers_f32(count)
        column = registers(vectors)
        for i in range(count):
            put(sums, i, load_f32(acc, i * 16))
        for step in range(steps):
            for v in range(vectors):
                at = weights + v * plane + step * 64
                prefetch_l2(at, follow if v % turns == turn else ahead)
                put(column, v, load(at, 0))
            for r in range(rows):
                value = repeat(x + r * stride, step)
                for v in range(vectors):
                    put(sums, r * vectors + v, combine(get(sums, r * vectors + v), value, get(column, v)))
        for i in range(count):
            store_f32(acc, i * 16, get(sums, i))

    return tile


def make_odd_word(fmt: str, vectors: int) -> Any:
    """A function that adds the last word of rows with an odd K, half a pair: `at` is its place in x, `weights` its columns."""
    load, _, combine, _, last = _operations(fmt)

    @subroutine
    def odd_word(weights, plane, at, stride, acc, rows):  # type: ignore[no-untyped-def]
        outlined()
        for r in range(rows):
            value = last(at + r * stride, 0)
            for v in range(vectors):
                place = (r * vectors + v) * 16
                store_f32(acc, place, combine(load_f32(acc, place), value, load(weights + v * plane, 0)))

    return odd_word


def make_panel(fmt: str, rows: int, vectors: int) -> Any:
    """A device function that runs row tiles of `rows`, then 4, 2 and 1 rows over one panel of one column block."""
    tiles = {n: make_tile(fmt, n, vectors) for n in {1, 2, min(4, rows), rows}}
    big, four, two, one = tiles[rows], tiles[min(4, rows)], tiles[2], tiles[1]
    row_bytes = vectors * 64

    @device
    def tiles_of(count):  # type: ignore[no-untyped-def]
        left = count % rows
        return count // rows + (left >> 2 & 1) + (left >> 1 & 1) + (left & 1)

    @device
    def panel(weights, plane, x, stride, acc, count, steps, follow, reach):  # type: ignore[no-untyped-def]
        turns = tiles_of(count)
        ahead, turn, r = reach, 0, 0
        if turns == 1:
            follow = ahead
        while r < count:
            left = count - r
            at, sums = x + r * stride, acc + r * row_bytes
            if left >= rows:
                big(weights, plane, at, stride, sums, steps, ahead, follow, turn, turns)
                r += rows
            elif left >= 4:
                four(weights, plane, at, stride, sums, steps, ahead, follow, turn, turns)
                r += 4
            elif left >= 2:
                two(weights, plane, at, stride, sums, steps, ahead, follow, turn, turns)
                r += 2
            else:
                one(weights, plane, at, stride, sums, steps, ahead, follow, turn, turns)
                r += 1
            ahead = 0
            turn += 1

    return panel, tiles_of


def make_finish(columns: int) -> Any:
    """A device function that takes one row's accumulators of one block through the epilogue."""
    half = columns // 2

    @device
    def finish(table, acc, row, group, block):  # type: ignore[no-untyped-def]
        n, gated, bias = get_i64(table, N), get_i64(table, GATED), get_i64(table, BIAS)
        if bias != 0:
            bias += group * get_i64(table, BIAS_STRIDE)
        width = half if gated else columns
        start = block * width
        act, scale = get_i64(table, ACT), get_i64(table, ROW_SCALE)
        for j in range(0, width, 16):
            count = min(16, width - j, n - start - j)
            if count > 0:
                value = add_bias(load_f32(acc, j), bias, start + j, count)
                if get_i64(table, CAPPED):
                    value = cap_value(value, get_f32(table, 2 * CAP))
                if act != 0:
                    value = activate(act, value)
                if gated:
                    value = value * add_bias(load_f32(acc, half + j), bias, n + start + j, count)
                if scale != 0:
                    value = value * broadcast_f32(get_f32(scale, row))
                put_row(get_i64(table, OUT), row * get_i64(table, OUT_STRIDE) + start + j, value, count, get_i64(table, MODE))

    return finish


@kernel
def gemm(fmt: str, rows: int, columns: int) -> Any:
    """Register tiles of `rows` x `columns` (a multiple of 16) over weights packed in blocks of `columns`."""
    vectors, line = columns // 16, columns * 4
    (panel, tiles_of), odd_word, finish = make_panel(fmt, rows, vectors), make_odd_word(fmt, vectors), make_finish(columns)

    @subroutine
    def chunk(table, acc, group, block, row, stop, following):  # type: ignore[no-untyped-def]
        outlined()
        steps, odd = get_i64(table, STEPS), get_i64(table, ODD)
        stride = get_i64(table, X_STRIDE)
        x = get_i64(table, X) + row * stride
        plane = (steps + odd) * 64
        weights = get_i64(get_i64(table, WEIGHTS), group) + block * vectors * plane
        piece = steps if steps <= WHOLE_WORDS else PANEL_WORDS
        for i in range((stop - row) * vectors):
            store_f32(acc, i * 16, zero_f32())
        start = 0
        while start < steps:
            length = min(piece, steps - start)
            at = weights + start * 64
            follow = length * 64
            if start + length == steps:
                follow = following - at if following != 0 else 0
            tail = AHEAD // 64
            if follow != 0 and start + length == steps and length > tail and tiles_of(stop - row) == 1:
                # A lone tile would look past the block's end here; it looks at the beginning of the next block instead.
                head = length - tail
                panel(at, plane, x + start * 4, stride, acc, stop - row, head, 0, AHEAD)
                panel(at + head * 64, plane, x + (start + head) * 4, stride, acc, stop - row, tail, 0, following - weights - (steps - tail) * 64)
            else:
                panel(at, plane, x + start * 4, stride, acc, stop - row, length, follow, AHEAD)
            start += length
        if odd:
            odd_word(weights + steps * 64, plane, x + steps * 4, stride, acc, stop - row)
        for r in range(row, stop):
            finish(table, acc + (r - row) * line, r, group, block)

    @device
    def address(table, item):  # type: ignore[no-untyped-def]
        """Where the weights of an item start; 0 if there is no such item or it has no rows."""
        blocks, offsets = get_i64(table, BLOCKS), get_i64(table, OFFSETS)
        group = item // blocks
        if group >= get_i64(table, GROUPS) or get_i32(offsets, group) == get_i32(offsets, group + 1):
            return 0
        size = (get_i64(table, STEPS) + get_i64(table, ODD)) * line
        return get_i64(get_i64(table, WEIGHTS), group) + item % blocks * size

    def run(table):  # type: ignore[no-untyped-def]
        acc = get_i64(table, SCRATCH) + enter(table) * get_i64(table, SCRATCH_STRIDE)
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
    """The matrix products of this machine."""
    isa = current_isa()
    return [gemm(fmt, isa.tile_rows, isa.tile_columns) for fmt in ("bf16", "f32")]
