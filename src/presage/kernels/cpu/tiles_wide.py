"""Tiles whose rows stay in bf16 while weights are packed tighter: 4-bit codes with a table, and bf16 itself without loss.

Both look 32 values up at once (`permute_u16`) and multiply them by pairs (`dot_bf16`), pairs ascending.

**4 bits.** 64 bytes hold 8 inputs of 16 outputs: 16-bit lane h of an output has inputs h, 2 + h, 4 + h, 6 + h in its nibbles, so shifting right
by 4 s brings pair s to the low nibbles. The table has 32 entries, the 16 values twice: the fifth bit of an index may be anything.

**bf16x12.** Of a bf16, sign and mantissa (8 bits) are kept as they are; exponents are few, so 16 of them are listed per unit (16 outputs x 128
inputs) and named by 4 bits. A unit is a line with the list and, 32 bytes on, how far away its plain bf16 words are if it has a 17th
exponent (0: it has none), then for every 8 inputs two lines of signs and mantissas and one of exponent numbers. Bits are those of bf16.
"""

from __future__ import annotations

from typing import Any

from presage.kernels.cpu.cache import device, subroutine
from presage.kernels.cpu.layout import SCALE_BYTES, X12_INPUTS, Layout
from presage.kernels.cpu.simd import (
    broadcast_f32,
    broadcast_i32,
    dot_bf16,
    float_of,
    fma,
    get,
    get_f32,
    get_i64,
    load_bf16,
    load_f32,
    load_i32,
    load_u8,
    outlined,
    prefetch_l2,
    put,
    registers_f32,
    registers_i32,
    splat_load_i32,
    store_f32,
    zero_f32,
)
from presage.kernels.cpu.simd_int import load_f16, permute_u16, repeat_low_half, table_u16

SCALES = {"bf16": load_bf16, "f16": load_f16, "f32": load_f32}


def _begin(layout: Layout, rows: int) -> Any:
    """First value of a group's sums: (8 - zero point) times the sum of the row's inputs, as codes are read as code - 8."""
    vectors, eight = layout.vectors, 8.0
    if not layout.zero:

        @device
        def begin(part, zeros, plane, sums, stride, group):  # type: ignore[no-untyped-def]
            for i in range(rows * vectors):
                put(part, i, zero_f32())

    else:

        @device
        def begin(part, zeros, plane, sums, stride, group):  # type: ignore[no-untyped-def]
            for r in range(rows):
                total = broadcast_f32(get_f32(sums + r * stride, group))
                for v in range(vectors):
                    put(part, r * vectors + v, (broadcast_f32(eight) - float_of(load_u8(zeros + v * plane, 0))) * total)

    return begin


@device
def _values():  # type: ignore[no-untyped-def]
    """The bf16 numbers -8 .. 7, twice."""
    return table_u16(
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    )  # fmt: skip


def wide_tile(layout: Layout, rows: int) -> Any:
    """4-bit codes with a scale per group, rows of bf16; one fma a group into the f32 accumulators."""
    vectors = layout.vectors
    count = rows * vectors
    groups, head, unit, codes = layout.groups, layout.head, layout.unit_bytes, layout.code_bytes
    scale_line = 16 * SCALE_BYTES[layout.scale]
    zeros_at = groups * scale_line
    begin, load_scale = _begin(layout, rows), SCALES[layout.scale]

    @subroutine
    def tile(weights, plane, x, sums, stride, acc, units, words, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        outlined()
        part, column, ready, values = registers_f32(count), registers_i32(vectors), registers_i32(vectors), _values()
        for group in range(units * groups):
            at, place = weights + group // groups * unit, group % groups
            if place == 0:
                for v in range(vectors):
                    for line in range(0, head, 64):
                        prefetch_l2(at + v * plane + line, follow if v % turns == turn else ahead)
            begin(part, at + zeros_at + place * 16, plane, sums, stride, group)
            start = at + head + place * codes
            for word in range(words):
                for v in range(vectors):
                    prefetch_l2(start + word * 64 + v * plane, follow if v % turns == turn else ahead)
                    put(column, v, load_i32(start + word * 64 + v * plane, 0))
                for pair in range(4):
                    for v in range(vectors):
                        put(ready, v, permute_u16(values, get(column, v) >> broadcast_i32(4 * pair)))
                    for r in range(rows):
                        value = splat_load_i32(x + r * stride + (group * words + word) * 16, pair)
                        for v in range(vectors):
                            put(part, r * vectors + v, dot_bf16(get(part, r * vectors + v), value, get(ready, v)))
            for v in range(vectors):
                scale = load_scale(at + v * plane + place * scale_line, 0)
                for r in range(rows):
                    out = (r * vectors + v) * 16
                    store_f32(acc, out, fma(get(part, r * vectors + v), scale, load_f32(acc, out)))

    return tile


@device
def _low_pairs(bits, exponents):  # type: ignore[no-untyped-def]
    """bf16 pairs from bytes 0 and 2 of each output (sign and mantissa) and their exponents in place."""
    return ((bits << broadcast_i32(8)) & broadcast_i32(0x80008000)) | (bits & broadcast_i32(0x007F007F)) | exponents


@device
def _high_pairs(bits, exponents):  # type: ignore[no-untyped-def]
    """The same from bytes 1 and 3."""
    return (bits & broadcast_i32(0x80008000)) | ((bits >> broadcast_i32(8)) & broadcast_i32(0x007F007F)) | exponents


def _packed_unit(rows: int, vectors: int) -> Any:
    """One unit of all planes from packed bits: accumulators are registers within it."""
    count = rows * vectors

    @device
    def unit(at, plane, x, stride, acc, ahead, follow, turn, turns, steps):  # type: ignore[no-untyped-def]
        total, table, column, ready = registers_f32(count), registers_i32(vectors), registers_i32(vectors), registers_i32(vectors)
        for i in range(count):
            put(total, i, load_f32(acc, i * 16))
        for v in range(vectors):
            prefetch_l2(at + v * plane, follow if v % turns == turn else ahead)
            put(table, v, repeat_low_half(load_i32(at + v * plane, 0)))
        for step in range(steps):
            start = at + 64 + step * 192
            for v in range(vectors):
                for line in range(0, 192, 64):
                    prefetch_l2(start + v * plane + line, follow if v % turns == turn else ahead)
                put(column, v, load_i32(start + v * plane + 128, 0))
            for pair in range(4):
                for v in range(vectors):
                    exponents = permute_u16(get(table, v), get(column, v) >> broadcast_i32(4 * pair))
                    bits = load_i32(start + v * plane + pair // 2 * 64, 0)
                    put(ready, v, _low_pairs(bits, exponents) if pair % 2 == 0 else _high_pairs(bits, exponents))
                for r in range(rows):
                    value = splat_load_i32(x + r * stride + step * 16, pair)
                    for v in range(vectors):
                        put(total, r * vectors + v, dot_bf16(get(total, r * vectors + v), value, get(ready, v)))
        for i in range(count):
            store_f32(acc, i * 16, get(total, i))

    return unit


@subroutine
def _slow_plane(at, x, stride, acc, row_bytes, rows):  # type: ignore[no-untyped-def]
    """One unit of one plane, packed or plain, row by row: for units next to a plain one. Same sums in the same order."""
    outlined()
    away = get_i64(at, 4)
    table = repeat_low_half(load_i32(at, 0))
    for r in range(rows):
        total = load_f32(acc + r * row_bytes, 0)
        for pair in range(X12_INPUTS // 2):
            step, turn = pair // 4, pair % 4
            if away != 0:
                w = load_i32(at + away, pair * 16)
            else:
                start = at + 64 + step * 192
                exponents = permute_u16(table, load_i32(start + 128, 0) >> broadcast_i32(4 * turn))
                bits = load_i32(start + turn // 2 * 64, 0)
                w = _low_pairs(bits, exponents) if turn % 2 == 0 else _high_pairs(bits, exponents)
            total = dot_bf16(total, splat_load_i32(x + r * stride, pair), w)
        store_f32(acc + r * row_bytes, 0, total)


def exponent_tile(layout: Layout, rows: int) -> Any:
    """bf16x12."""
    vectors, size, x_bytes = layout.vectors, layout.unit_bytes, layout.x_bytes
    row_bytes = layout.columns * 4
    packed = _packed_unit(rows, vectors)

    @subroutine
    def tile(weights, plane, x, sums, stride, acc, units, words, ahead, follow, turn, turns):  # type: ignore[no-untyped-def]
        outlined()
        for i in range(units):
            at, place = weights + i * size, x + i * x_bytes
            away = get_i64(at, 4)
            for v in range(1, vectors):
                away |= get_i64(at + v * plane, 4)
            if away == 0:
                packed(at, plane, place, stride, acc, ahead, follow, turn, turns, words)
            else:
                for v in range(vectors):
                    _slow_plane(at + v * plane, place, stride, acc + v * 64, row_bytes, rows)

    return tile

