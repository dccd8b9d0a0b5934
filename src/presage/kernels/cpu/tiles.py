"""Register tiles of the matrix product, one maker per kind of format, behind one signature.

    tile(weights, plane, x, sums, stride, acc, units, words, ahead, follow, turn, turns)

adds `units` units of K to a tile of rows x (vectors * 16) accumulators at `acc`. `weights`: first plane's first unit, planes are `plane`
bytes apart; `x`: first row's first unit, rows are `stride` bytes apart, `sums` where its activation sums are (grouped formats; same
stride). Lines are prefetched at `ahead` bytes, or by this tile's share (`turn` of `turns`) at `follow`. `words`: 64-byte lines of a
group's codes, given at run time because a known number would be unrolled into far too much code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.kernels.cpu.cache import device, subroutine
from presage.kernels.cpu.layout import SCALE_BYTES, Layout
from presage.kernels.cpu.simd import (
    broadcast_f32,
    broadcast_i32,
    dot_bf16,
    dot_u8s8,
    float_of,
    fma,
    get,
    get_i32,
    get_u16,
    load_bf16,
    load_f32,
    load_i32,
    load_u8,
    outlined,
    prefetch_l2,
    put,
    registers_f32,
    registers_i32,
    splat_load_f32,
    splat_load_i32,
    store_f32,
    store_i32,
    zero_f32,
    zero_i32,
)
from presage.kernels.cpu.simd_int import dot_u7s8, high_nibbles, load_f16, low_nibbles
from presage.kernels.cpu.tiles_wide import exponent_tile, wide_tile


@device
def _dot(acc, x, w):  # type: ignore[no-untyped-def]
    return dot_bf16(acc, x, w)


@device
def _multiply_add(acc, x, w):  # type: ignore[no-untyped-def]
    return fma(x, w, acc)


@device
def _integer_dot(acc, x, w):  # type: ignore[no-untyped-def]
    return dot_u8s8(acc, w, x)


@device
def _odd_pair(x, step):  # type: ignore[no-untyped-def]
    return broadcast_i32(get_u16(x, 2 * step))


@device
def _no_pair(x, step):  # type: ignore[no-untyped-def]
    return zero_f32()


def _operations(fmt: str) -> tuple[Any, ...]:
    """(load 16 outputs, repeat a word of x, multiply and add, registers for weights, accumulators: registers, load, store)."""
    if fmt == "bf16":
        return load_i32, splat_load_i32, _dot, registers_i32, registers_f32, load_f32, store_f32
    if fmt == "f32":
        return load_f32, splat_load_f32, _multiply_add, registers_f32, registers_f32, load_f32, store_f32
    return load_i32, splat_load_i32, _integer_dot, registers_i32, registers_i32, load_i32, store_i32


def make_tile(layout: Layout, rows: int) -> Any:
    """The tile of `rows` rows for a layout."""
    if layout.fmt == "bf16x12":
        return exponent_tile(layout, rows)
    if layout.group:
        return _grouped_tile(layout, rows) if layout.integer else wide_tile(layout, rows)
    return _word_tile(layout, rows)


def _word_tile(layout: Layout, rows: int) -> Any:
    """Formats whose unit is one 4-byte word of 16 outputs: two bf16, one f32, four int8."""
    load, repeat, combine, registers, sums_of, load_acc, store_acc = _operations(layout.fmt)
    vectors = layout.vectors
    count = rows * vectors

    @subroutine
    def tile(weights, plane, x, sums, stride, acc, units, words, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        outlined()
        total = sums_of(count)
        column = registers(vectors)
        for i in range(count):
            put(total, i, load_acc(acc, i * 16))
        for step in range(units):
            for v in range(vectors):
                at = weights + v * plane + step * 64
                prefetch_l2(at, follow if v % turns == turn else ahead)
                put(column, v, load(at, 0))
            for r in range(rows):
                value = repeat(x + r * stride, step)
                for v in range(vectors):
                    put(total, r * vectors + v, combine(get(total, r * vectors + v), value, get(column, v)))
        for i in range(count):
            store_acc(acc, i * 16, get(total, i))

    return tile


SCALES = {"bf16": load_bf16, "f16": load_f16, "f32": load_f32}


def _nibble_step(rows: int, vectors: int) -> Any:
    """Eight inputs of a tile: 64 bytes a plane hold inputs 0-3 in the low, 4-7 in the high nibbles of each output's word."""

    @device
    def step(ints, column, at, plane, x, stride, place, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        for v in range(vectors):
            prefetch_l2(at + v * plane, follow if v % turns == turn else ahead)
            put(column, v, load_i32(at + v * plane, 0))
        for r in range(rows):
            value = splat_load_i32(x + r * stride + place * 8, 0)
            for v in range(vectors):
                put(ints, r * vectors + v, dot_u7s8(get(ints, r * vectors + v), low_nibbles(get(column, v)), value))
        for r in range(rows):
            value = splat_load_i32(x + r * stride + place * 8, 1)
            for v in range(vectors):
                put(ints, r * vectors + v, dot_u7s8(get(ints, r * vectors + v), high_nibbles(get(column, v)), value))

    return step


def _byte_step(rows: int, vectors: int) -> Any:
    """Four inputs of a tile: one byte each."""

    @device
    def step(ints, column, at, plane, x, stride, place, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        for v in range(vectors):
            prefetch_l2(at + v * plane, follow if v % turns == turn else ahead)
            put(column, v, load_i32(at + v * plane, 0))
        for r in range(rows):
            value = splat_load_i32(x + r * stride + place * 4, 0)
            for v in range(vectors):
                put(ints, r * vectors + v, dot_u8s8(get(ints, r * vectors + v), get(column, v), value))

    return step


def _begin(layout: Layout, rows: int) -> Any:
    """First value of a group's integer sums: minus zero point times the sum of the row's codes, so codes need no offset."""
    vectors, half = layout.vectors, 8 if layout.bits == 4 else 128

    if layout.minima:

        @device
        def begin(ints, zeros, plane, sums, stride, group):  # type: ignore[no-untyped-def]
            for i in range(rows * vectors):
                put(ints, i, zero_i32())

    elif layout.zero:

        @device
        def begin(ints, zeros, plane, sums, stride, group):  # type: ignore[no-untyped-def]
            for r in range(rows):
                total = broadcast_i32(-get_i32(sums + r * stride, group))
                for v in range(vectors):
                    put(ints, r * vectors + v, load_u8(zeros + v * plane, 0) * total)

    else:

        @device
        def begin(ints, zeros, plane, sums, stride, group):  # type: ignore[no-untyped-def]
            for r in range(rows):
                total = broadcast_i32(-half * get_i32(sums + r * stride, group))
                for v in range(vectors):
                    put(ints, r * vectors + v, total)

    return begin


def _grouped_tile(layout: Layout, rows: int) -> Any:
    """Integer codes with a scale per group: integer sums within a group, one fma a group into the f32 accumulators (in the first-level cache)."""
    vectors = layout.vectors
    count = rows * vectors
    groups, head, unit, codes = layout.groups, layout.head, layout.unit_bytes, layout.code_bytes
    scale_line = 16 * SCALE_BYTES[layout.scale]
    zeros_at = groups * scale_line
    begin, load_scale, minima = _begin(layout, rows), SCALES[layout.scale], layout.minima
    step = (_nibble_step if layout.bits == 4 else _byte_step)(rows, vectors)

    @subroutine
    def tile(weights, plane, x, sums, stride, acc, units, words, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        outlined()
        ints = registers_i32(count)
        column = registers_i32(vectors)
        for group in range(units * groups):
            at, part = weights + group // groups * unit, group % groups
            if part == 0:
                for v in range(vectors):
                    for line in range(0, head, 64):
                        prefetch_l2(at + v * plane + line, follow if v % turns == turn else ahead)
            begin(ints, at + zeros_at + part * 16, plane, sums, stride, group)
            start = at + head + part * codes
            for word in range(words):
                step(ints, column, start + word * 64, plane, x, stride, group * words + word, ahead, follow, turn, turns)
            for v in range(vectors):
                scale = load_scale(at + v * plane + part * scale_line, 0)
                for r in range(rows):
                    place = (r * vectors + v) * 16
                    total = load_f32(acc, place)
                    if minima:
                        low = load_scale(at + v * plane + zeros_at + part * scale_line, 0)
                        total = fma(broadcast_f32(np.float32(-get_i32(sums + r * stride, group))), low, total)
                    store_f32(acc, place, fma(float_of(get(ints, r * vectors + v)), scale, total))

    return tile


def make_odd_word(layout: Layout) -> Any:
    """Adds the last word of rows with an odd K, half a pair (bf16 only): `at` is its place in x, `weights` its outputs."""
    vectors = layout.vectors
    load, _, combine, *_ = _operations(layout.fmt)
    last = _odd_pair if layout.fmt == "bf16" else _no_pair

    @subroutine
    def odd_word(weights, plane, at, stride, acc, rows):  # type: ignore[no-untyped-def]
        outlined()
        for r in range(rows):
            value = last(at + r * stride, 0)
            for v in range(vectors):
                place = (r * vectors + v) * 16
                store_f32(acc, place, combine(load_f32(acc, place), value, load(weights + v * plane, 0)))

    return odd_word


def make_start(layout: Layout) -> Any:
    """Sets a row's accumulators before its first unit: zeros, or for `w8` the correction for codes stored with 128 added."""
    vectors = layout.vectors
    if layout.integer and not layout.group:

        @device
        def start(acc, meta):  # type: ignore[no-untyped-def]
            for v in range(vectors):
                store_i32(acc, v * 16, broadcast_i32(-128 * get_i32(meta, 1)))

    else:

        @device
        def start(acc, meta):  # type: ignore[no-untyped-def]
            for v in range(vectors):
                store_f32(acc, v * 16, zero_f32())

    return start


def make_value(layout: Layout) -> Any:
    """A row's accumulators to products: `scales` are the outputs' scales (w8), `meta` is where the row's own scale lies."""
    if not layout.integer:  # rows as they are

        @device
        def value(acc, place, scales, meta):  # type: ignore[no-untyped-def]
            return load_f32(acc, place)

    elif layout.group:

        @device
        def value(acc, place, scales, meta):  # type: ignore[no-untyped-def]
            return load_f32(acc, place) * splat_load_f32(meta, 0)

    else:

        @device
        def value(acc, place, scales, meta):  # type: ignore[no-untyped-def]
            return float_of(load_i32(acc, place)) * load_f32(scales, place) * splat_load_f32(meta, 0)

    return value
