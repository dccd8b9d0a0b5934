"""Round-to-nearest quantisation of a weight, at memory speed, so that a bf16 checkpoint can be quantised while it loads.

8 bits: one scale a row, its largest magnitude becomes 127. 4 bits, symmetric: per group, the scale (a bf16) is the extreme value over -8
shrunk so far (0 to 25 %) that the squared error is least; clipping the extreme a little is worth it for most groups.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from presage.kernels.cpu.cache import Kernel, device, kernel, subroutine
from presage.kernels.cpu.prepare import row_limit
from presage.kernels.cpu.region import HEADER, claim, enter, leave
from presage.kernels.cpu.simd import (
    broadcast_f32,
    float_of,
    fma,
    get_bf16,
    get_i64,
    load_bf16_n,
    load_f32_n,
    maximum,
    outlined,
    reduce_max,
    reduce_sum,
    round_int,
    select,
    set_bf16,
    set_f32,
    store_i8,
    zero_f32,
)
from presage.kernels.cpu.team import Table, Team
from presage.kernels.errors import KernelArgumentError

TRIES, SHRINK = 6, 0.05
"""Scales tried per group, each this part of the first smaller than the one before."""

_WORDS = 7
_SOURCE, _HALF, _ROWS, _K, _CODES, _CODES_STRIDE, _SCALES = range(HEADER, HEADER + _WORDS)


@device
def _values(x, half, d, n):  # type: ignore[no-untyped-def]
    return load_bf16_n(x, d, n) if half else load_f32_n(x, d, n)


@device
def _clamped(x, low, high):  # type: ignore[no-untyped-def]
    y = select(x < broadcast_f32(low), broadcast_f32(low), x)
    return select(y > broadcast_f32(high), broadcast_f32(high), y)


@subroutine
def _row8(x, half, k, codes, scale):  # type: ignore[no-untyped-def]
    outlined()
    limit = row_limit(x, half, k)
    factor = broadcast_f32(np.float32(127.0) / limit if limit > np.float32(0.0) else np.float32(0.0))
    for d in range(0, k, 16):
        n = 16 if k - d > 16 else k - d
        store_i8(codes, d, round_int(_values(x, half, d, n) * factor))
    set_f32(scale, 0, limit / np.float32(127.0))


@device
def _rounded(x, factor):  # type: ignore[no-untyped-def]
    return _clamped(float_of(round_int(x * factor)), np.float32(-8.0), np.float32(7.0))


@device
def _group_error(x, half, start, stop, scale):  # type: ignore[no-untyped-def]
    """Squared error of a group under a scale."""
    factor = broadcast_f32(np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0))
    step, total = broadcast_f32(scale), zero_f32()
    for d in range(start, stop, 16):
        n = 16 if stop - d > 16 else stop - d
        w = _values(x, half, d, n)
        lost = w - _rounded(w, factor) * step
        total = fma(lost, lost, total)
    return reduce_sum(total)


@device
def _extreme(x, half, start, stop):  # type: ignore[no-untyped-def]
    """The value of largest magnitude, with its sign; the positive one if two are equal."""
    high, low = zero_f32(), zero_f32()
    for d in range(start, stop, 16):
        n = 16 if stop - d > 16 else stop - d
        w = _values(x, half, d, n)
        high, low = maximum(w, high), maximum(zero_f32() - w, low)
    top, bottom = reduce_max(high), reduce_max(low)
    return top if top >= bottom else -bottom


@subroutine
def _group4(x, half, start, stop, codes, scale):  # type: ignore[no-untyped-def]
    """One group: choose the scale, write it as bf16, write the codes."""
    outlined()
    extreme = _extreme(x, half, start, stop)
    best, chosen = np.float32(np.inf), np.float32(0.0)
    for i in range(TRIES):
        set_bf16(scale, 0, extreme / np.float32(-8.0) * (np.float32(1.0) - np.float32(i) * np.float32(SHRINK)))
        tried = get_bf16(scale, 0)
        error = _group_error(x, half, start, stop, tried)
        if error < best:
            best, chosen = error, tried
    set_bf16(scale, 0, chosen)
    factor = broadcast_f32(np.float32(1.0) / chosen if chosen != np.float32(0.0) else np.float32(0.0))
    for d in range(start, stop, 16):
        n = 16 if stop - d > 16 else stop - d
        store_i8(codes, d, round_int(_rounded(_values(x, half, d, n), factor)))


@kernel
def quantise_rows(bits: int, group: int) -> Any:
    """Rows of f32 or bf16 [N, K] to codes and scales."""

    def run(table):  # type: ignore[no-untyped-def]
        enter(table)
        half, k, stride = get_i64(table, _HALF), get_i64(table, _K), get_i64(table, _CODES_STRIDE)
        groups = (k + group - 1) // group if group else 1
        row = claim(table)
        while row < get_i64(table, _ROWS):
            x = get_i64(table, _SOURCE) + row * k * (2 if half else 4)
            codes = get_i64(table, _CODES) + row * stride
            scales = get_i64(table, _SCALES) + row * groups * (4 if bits == 8 else 2)
            if bits == 8:
                _row8(x, half, k, codes, scales)
            else:
                for g in range(groups):
                    stop = (g + 1) * group
                    _group4(x, half, g * group, stop if stop < k else k, codes, scales + 2 * g)
            row = claim(table)
        leave(table)

    return run


def quantise(weight: torch.Tensor, bits: int, group: int, team: Team | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [N, K], scales) of a weight [N, K]: 8 bits give f32 scales [N, 1], 4 bits bf16 scales [N, ceil(K / group)].

    Raises KernelArgumentError for another type than f32 or bf16, or another number of bits.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.ndim != 2 or bits not in (4, 8):
        raise KernelArgumentError(f"cannot quantise {weight.dtype} {tuple(weight.shape)} to {bits} bits")
    source = weight.contiguous()
    n, k = source.shape
    stride = -(-k // 16) * 16
    codes = torch.empty(n, stride, dtype=torch.int8)
    scales = torch.empty(n, 1) if bits == 8 else torch.empty(n, -(-k // group), dtype=torch.bfloat16)
    table = team.table(_WORDS) if team else Table(_WORDS, 1)
    table.set(source.data_ptr(), int(source.dtype == torch.bfloat16), n, k, codes.data_ptr(), stride, scales.data_ptr())
    function = quantise_rows(bits, 0 if bits == 8 else group)
    if team:
        team.run(function, table.address, source.nbytes)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(function.address)(table.address)
    return codes[:, :k], scales


def warm_kernels() -> list[Kernel]:
    """The common shapes."""
    return [quantise_rows(8, 0), quantise_rows(4, 128)]
