"""The first phase of a matrix product: rows as they lie in memory become rows as the tiles read them.

A row may be normalised, gathered into another order of inputs, and rounded to bf16 or quantised to int8 with one scale of its own
(its largest magnitude becomes 127). Each is a row's own affair, so its bits do not depend on the batch. Threads share the rows; a barrier follows.

A prepared int8 row: codes, zeros up to whole units, then at `META`: its scale (f32), the sum of its codes (i32), and from the next line
on the sums of every group (i32), which stand for the zero points of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.kernels.cpu.cache import device, subroutine
from presage.kernels.cpu.layout import LINE, Layout
from presage.kernels.cpu.norm import inverse_rms, row_mean
from presage.kernels.cpu.region import share, team_size
from presage.kernels.cpu.simd import (
    broadcast_f32,
    broadcast_i32,
    float_bits,
    float_of,
    fma,
    get_bf16,
    get_f32,
    get_i64,
    int_bits,
    load_bf16_n,
    load_f32_n,
    maximum,
    outlined,
    reduce_max,
    reduce_sum,
    round_int,
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


def row_bytes(layout: Layout, k: int) -> tuple[int, int]:
    """(bytes of a prepared row, where its scale and sums are) for K inputs."""
    if not layout.integer:
        return -(-k * (2 if layout.fmt == "bf16" else 4) // LINE) * LINE, 0
    codes = -(-layout.units(k) * layout.unit_k // LINE) * LINE
    sums = layout.units(k) * layout.groups * 4
    return codes + LINE + -(-sums // LINE) * LINE, codes


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


@subroutine
def _normalise(source, weight, bias, eps, offset, center, width, out):  # type: ignore[no-untyped-def]
    """The norm of an f32 row, in f32: the same operations in the same order as the norm kernel's."""
    outlined()
    mean = row_mean(source, width) if center else np.float32(0.0)
    scale, shift = broadcast_f32(inverse_rms(source, width, mean, eps)), broadcast_f32(mean)
    for d in range(0, width, 16):
        n = _count(width, d)
        y = (load_f32_n(source, d, n) - shift) * scale
        w = load_f32_n(weight, d, n) + broadcast_f32(offset)
        y = fma(y, w, load_f32_n(bias, d, n)) if bias != 0 else y * w
        # Lanes beyond the row: weights there were not read, so y * 0 could only be NaN for a row that is NaN already.
        store_f32_n(out, d, y, n)


@device
def _absolute(x):  # type: ignore[no-untyped-def]
    return float_bits(int_bits(x) & broadcast_i32(0x7FFFFFFF))


@device
def row_limit(x, half, width):  # type: ignore[no-untyped-def]
    """Largest magnitude of a row (NaN passed over)."""
    high = zero_f32()
    for d in range(0, width, 16):
        n = _count(width, d)
        high = maximum(_absolute(load_bf16_n(x, d, n) if half else load_f32_n(x, d, n)), high)
    return reduce_max(high)


@device
def _put_codes(x, half, width, factor, out, d):  # type: ignore[no-untyped-def]
    """Quantise 16 inputs (zeros beyond the row); returns their codes."""
    n = _count(width, d)
    q = zero_i32()
    if n > 0:
        q = round_int((load_bf16_n(x, d, n) if half else load_f32_n(x, d, n)) * factor)
    store_i8(out, d, q)
    return q


def make_quantise(layout: Layout) -> Any:
    """A function that quantises one row (f32, or bf16 where `half`) of `width` inputs to codes at `out`, scale and sums at `meta`."""
    group, keep = layout.group or 64, bool(layout.group)

    @subroutine
    def quantise(x, half, width, out, meta):  # type: ignore[no-untyped-def]
        outlined()
        limit = row_limit(x, half, width)
        factor = broadcast_f32(np.float32(127.0) / limit if limit > np.float32(0.0) else np.float32(0.0))
        row = np.int64(0)
        for start in range(0, meta - out, group):
            total = zero_i32()
            for d in range(start, start + group, 16):
                total = total + _put_codes(x, half, width, factor, out, d)
            # Exact in f32: far below 2**24.
            part = np.int64(reduce_sum(float_of(total)))
            row += part
            if keep:
                set_i32(meta + 64, start // group, part)
        set_f32(meta, 0, limit / np.float32(127.0))
        set_i32(meta, 1, row)

    return quantise


def make_prepare(layout: Layout, base: int, x_word: int, meta_word: int, scratch_word: int) -> Any:
    """The phase itself. `base`: table word of SOURCE; the others: of prepared rows and META, and of scratch; their strides follow both."""
    stride_word, scratch_stride = x_word + 1, scratch_word + 1
    source_at, stride_at, half_at, rows_at, k_at, perm_at, norm_at, bias_at, floats_at, center_at, wide_at = range(base, base + WORDS)
    integer, half_out, quantise = layout.integer, layout.fmt == "bf16", make_quantise(layout)

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
                for d in range(0, width, 16):
                    if half_out:
                        store_bf16_n(out, d, load_f32_n(x, d, _count(width, d)), _count(width, d))
                    else:
                        store_f32_n(out, d, load_f32_n(x, d, _count(width, d)), _count(width, d))

    return prepare
