"""The first phase of a matrix product: rows as they lie in memory become rows as the tiles read them.

A row may be normalised, gathered into another order of inputs, and rounded to bf16 or quantised to int8 with one scale of its own
(its largest magnitude becomes 127). Each is a row's own affair, so its bits do not depend on the batch. Threads share the rows; a barrier follows.

A prepared int8 row: codes, zeros up to whole units, then at `META`: its scale (f32), the sum of its codes (i32), and from the next line
on the sums of every group (i32), which stand for the zero points of the weights. A bf16 row for weights with zero points has f32 sums there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.kernels.cpu.cache import device, subroutine
from presage.kernels.cpu.layout import LINE, Layout
from presage.kernels.cpu.norm import inverse_rms, row_mean
from presage.kernels.cpu.region import share, team_size
from presage.kernels.cpu.simd import (
    any_of,
    broadcast_f32,
    broadcast_i32,
    float_bits,
    float_of,
    fma,
    get_bf16,
    get_f32,
    get_i64,
    int_bits,
    load_bf16,
    load_bf16_n,
    load_f32,
    load_f32_n,
    outlined,
    reduce_max,
    reduce_sum,
    select_i32,
    set_f32,
    set_i32,
    store_bf16_n,
    store_f32_n,
    store_i8,
    zero_f32,
    zero_i32,
)

WORDS = 11
SOURCE, SOURCE_STRIDE, SOURCE_HALF, ROWS, K, PERM, NORM, NORM_BIAS, NORM_FLOATS, CENTER, WIDE = range(WORDS)
"""Words of the preparation within a table, from the base its kernel gives it. SOURCE 0: rows are used where they are. SOURCE_STRIDE in bytes,
NORM: address of the norm's weight or 0, NORM_FLOATS: eps and what is added to the weight, WIDE: where in a thread's scratch one f32 row fits."""


_SIZES = {"i8": 1, "bf16": 2, "f32": 4}


def row_bytes(layout: Layout, k: int) -> tuple[int, int]:
    """(bytes of a prepared row, where its scale and sums are) for K inputs."""
    width = layout.units(k) * layout.unit_k if layout.filled else k
    values = -(-width * _SIZES[layout.operand] // LINE) * LINE
    if not layout.integer and not layout.zero:
        return values, 0
    sums = layout.units(k) * layout.groups * 4
    return values + LINE + -(-sums // LINE) * LINE, values


def wide_bytes(k: int) -> int:
    """Scratch of a thread for one row in f32."""
    return -(-k // 16) * 16 * 4


@device
def _count(width, d):  # type: ignore[no-untyped-def]
    return 16 if width - d > 16 else width - d


@subroutine
def _widen(source, half, width, perm, out):  # type: ignore[no-untyped-def]
    """A row as f32 [width, up to whole vectors: zeros], in the order `perm` (int64 places, or 0 for its own)."""
    outlined()
    for d in range(0, width, 16):
        n = _count(width, d)
        if perm == 0:
            x = load_bf16_n(source, d, n) if half else load_f32_n(source, d, n)
            store_f32_n(out, d, x, 16)
        else:
            store_f32_n(out, d, zero_f32(), 16)
            for i in range(n):
                place = get_i64(perm, d + i)
                set_f32(out, d + i, get_bf16(source, place) if half else get_f32(source, place))


@device
def _read(x, half, d, n):  # type: ignore[no-untyped-def]
    """16 inputs from place d on as f32, zeros beyond the first n."""
    if n >= 16:
        return load_bf16(x, d) if half else load_f32(x, d)
    return load_bf16_n(x, d, n) if half else load_f32_n(x, d, n)


@device
def row_limit(x, half, width):  # type: ignore[no-untyped-def]
    """Largest magnitude of a row; NaN if there is one among them, which then reaches every output of the row."""
    # Without their signs, floats are ordered as integers, NaN above infinity.
    high, low = zero_i32(), broadcast_i32(0x7FFFFFFF)
    for d in range(0, width, 16):
        bits = int_bits(_read(x, half, d, width - d)) & low
        high = select_i32(bits > high, bits, high)
    return reduce_limit(high)


@device
def reduce_limit(high):  # type: ignore[no-untyped-def]
    """The largest of 16 magnitudes given by their bits."""
    value = float_bits(high)
    nan = any_of(high > broadcast_i32(0x7F800000))
    return np.float32(np.nan) if nan else reduce_max(value)


@subroutine
def _normalise(source, weight, bias, eps, offset, center, width, out):  # type: ignore[no-untyped-def]
    """The norm of an f32 row, in f32: the same operations in the same order as the norm kernel's."""
    outlined()
    mean = row_mean(source, width) if center else np.float32(0.0)
    scale, shift, more = broadcast_f32(inverse_rms(source, width, mean, eps)), broadcast_f32(mean), broadcast_f32(offset)
    for d in range(0, width, 16):
        n = width - d
        y = (_read(source, 0, d, n) - shift) * scale
        w = _read(weight, 0, d, n) + more
        y = fma(y, w, _read(bias, 0, d, n)) if bias != 0 else y * w
        store_f32_n(out, d, y, _count(width, d))


def make_quantise(layout: Layout) -> Any:
    """A function that quantises one row (f32, or bf16 where `half`) of `width` inputs to codes at `out`, scale and sums at `meta`."""
    group, keep = layout.group or 64, bool(layout.group)

    @subroutine
    def quantise(x, half, width, out, meta):  # type: ignore[no-untyped-def]
        outlined()
        limit = row_limit(x, half, width)
        factor = broadcast_f32(np.float32(127.0) / limit if limit > np.float32(0.0) else np.float32(0.0))
        # Adding 1.5 * 2**23 rounds to the nearest even integer and leaves it in the low bits.
        magic, offset = broadcast_f32(np.float32(12582912.0)), broadcast_i32(0x4B400000)
        row = np.int64(0)
        for start in range(0, meta - out, group):
            total = zero_i32()
            for d in range(start, start + group, 16):
                q = int_bits(_read(x, half, d, width - d) * factor + magic) - offset if d < width else zero_i32()
                store_i8(out, d, q)
                total = total + q
            # Exact in f32: far below 2**24.
            part = np.int64(reduce_sum(float_of(total)))
            row += part
            if keep:
                set_i32(meta + 64, start // group, part)
        set_f32(meta, 0, limit / np.float32(127.0))
        set_i32(meta, 1, row)

    return quantise


def make_keep(layout: Layout) -> Any:
    """A function that writes an f32 row as the tiles read it, filled up to whole units, and its groups' sums if weights have zero points."""
    half, fill, group, total_up = layout.operand == "bf16", layout.unit_k if layout.filled else 1, layout.group or 64, layout.zero

    @subroutine
    def keep(x, width, out, meta):  # type: ignore[no-untyped-def]
        outlined()
        end = (width + fill - 1) // fill * fill
        for d in range(0, end, 16):
            n = width - d
            value = _read(x, 0, d, n) if n > 0 else zero_f32()
            if half:
                store_bf16_n(out, d, value, _count(end, d))
            else:
                store_f32_n(out, d, value, _count(end, d))
        if total_up:
            for start in range(0, end, group):
                total = zero_f32()
                for d in range(start, start + group, 16):
                    total = total + load_bf16(out, d)
                set_f32(out + meta + 64, start // group, reduce_sum(total))

    return keep


def make_prepare(layout: Layout, base: int, x_word: int, meta_word: int, scratch_word: int) -> Any:
    """The phase itself. `base`: table word of SOURCE; the others: of prepared rows and META, and of scratch; their strides follow both."""
    stride_word, scratch_stride = x_word + 1, scratch_word + 1
    source_at, stride_at, half_at, rows_at, k_at, perm_at, norm_at, bias_at, floats_at, center_at, wide_at = range(base, base + WORDS)
    integer, quantise, keep = layout.integer, make_quantise(layout), make_keep(layout)

    @subroutine
    def prepare(table, rank):  # type: ignore[no-untyped-def]
        outlined()
        width, half, perm, norm = get_i64(table, k_at), get_i64(table, half_at), get_i64(table, perm_at), get_i64(table, norm_at)
        wide = get_i64(table, scratch_word) + rank * get_i64(table, scratch_stride) + get_i64(table, wide_at)
        start, stop = share(get_i64(table, rows_at), rank, team_size(table))
        for r in range(start, stop):
            x, narrow = get_i64(table, source_at) + r * get_i64(table, stride_at), half
            out = get_i64(table, x_word) + r * get_i64(table, stride_word)
            if norm != 0:
                eps, offset = get_f32(table, 2 * floats_at), get_f32(table, 2 * floats_at + 1)
                _normalise(x, norm, get_i64(table, bias_at), eps, offset, get_i64(table, center_at), width, wide)
                x, narrow = wide, 0
            elif perm != 0 or not integer:
                _widen(x, half, width, perm, wide)
                x, narrow = wide, 0
            if integer:
                quantise(x, narrow, width, out, out + get_i64(table, meta_word))
            else:
                keep(x, width, out, get_i64(table, meta_word))

    return prepare
