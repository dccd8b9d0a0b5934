"""RMS and layer normalisation of rows: 16 fixed lanes and a fixed tree, so a row's bits depend on the row alone.

    norm = Norm(team, weight, eps)          # once a layer; bias=... makes it a layer norm
    norm(x, out)                            # x f32 [t, d] or [t, heads, d] (any strides but the last), out f32 or bf16 of the same shape
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.cache import device, kernel
from presage.kernels.cpu.region import HEADER, enter, share, team_size
from presage.kernels.cpu.simd import (
    broadcast_f32,
    first_lanes,
    fma,
    get_f32,
    get_i64,
    load_f32_n,
    reduce_sum,
    select,
    store_bf16_n,
    store_f32_n,
    zero_f32,
)
from presage.kernels.cpu.team import Team

_WEIGHT, _BIAS, _WIDTH, _FLOATS, _CENTER = range(HEADER, HEADER + 5)
_X, _OUT, _OUT_HALF, _ROWS, _INNER, _X_OUTER, _X_INNER, _OUT_OUTER, _OUT_INNER = range(HEADER + 5, HEADER + 14)
_FIELDS = 14
_ONE = np.float32(1.0)


@device
def _lanes(width, d):  # type: ignore[no-untyped-def]
    return 16 if width - d > 16 else width - d


@device
def row_mean(x, width):  # type: ignore[no-untyped-def]
    """Mean of the f32 row at address ``x``."""
    total = zero_f32()
    for d in range(0, width, 16):
        total = total + load_f32_n(x, d, _lanes(width, d))
    return reduce_sum(total) / np.float32(width)


@device
def inverse_rms(x, width, mean, eps):  # type: ignore[no-untyped-def]
    """1 / sqrt(mean of (x - mean)^2 + eps) of the row at address ``x``; an RMS norm passes mean 0."""
    total, shift = zero_f32(), broadcast_f32(mean)
    for d in range(0, width, 16):
        n = _lanes(width, d)
        y = select(first_lanes(n), load_f32_n(x, d, n) - shift, zero_f32())
        total = fma(y, y, total)
    return _ONE / np.sqrt(reduce_sum(total) / np.float32(width) + eps)


@device
def _normalise(x, weight, bias, out, half, width, mean, inverse, offset):  # type: ignore[no-untyped-def]
    scale, shift = broadcast_f32(inverse), broadcast_f32(mean)
    for d in range(0, width, 16):
        n = _lanes(width, d)
        y = (load_f32_n(x, d, n) - shift) * scale
        w = load_f32_n(weight, d, n) + broadcast_f32(offset)
        y = fma(y, w, load_f32_n(bias, d, n)) if bias != 0 else y * w
        if half:
            store_bf16_n(out, d, y, n)
        else:
            store_f32_n(out, d, y, n)


@kernel
def _norm():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank = enter(table)
        x, out, weight, bias = get_i64(table, _X), get_i64(table, _OUT), get_i64(table, _WEIGHT), get_i64(table, _BIAS)
        width, inner, half = get_i64(table, _WIDTH), get_i64(table, _INNER), get_i64(table, _OUT_HALF)
        eps, offset, size = get_f32(table, 2 * _FLOATS), get_f32(table, 2 * _FLOATS + 1), 2 if half else 4
        start, stop = share(get_i64(table, _ROWS), rank, team_size(table))
        for r in range(start, stop):
            i, j = r // inner, r % inner
            row = x + 4 * (i * get_i64(table, _X_OUTER) + j * get_i64(table, _X_INNER))
            target = out + size * (i * get_i64(table, _OUT_OUTER) + j * get_i64(table, _OUT_INNER))
            mean = row_mean(row, width) if get_i64(table, _CENTER) != 0 else np.float32(0.0)
            inverse = inverse_rms(row, width, mean, eps)
            _normalise(row, weight, bias, target, half, width, mean, inverse, offset)

    return run


class Norm:
    """y = x / sqrt(mean(x^2) + eps) * weight (RMS norm; Zhang and Sennrich, arXiv 1910.07467).

    ``plus_one`` multiplies by 1 + weight (gemma). ``center`` subtracts the mean first and ``bias`` is added last (layer norm, gpt2).
    ``weight`` f32 [d]. Raises ConfigError for other types or shapes.
    """

    def __init__(
        self, team: Team, weight: torch.Tensor, eps: float, plus_one: bool = False, bias: torch.Tensor | None = None, center: bool = False
    ) -> None:
        for part in (weight, bias):
            if part is not None and (part.dtype != torch.float32 or not part.is_contiguous() or part.shape != weight.shape):
                raise ConfigError(f"norm: weights must be contiguous f32, not {part.dtype} {tuple(part.shape)}", param="weight")
        self.team, self.width, self._alive = team, weight.numel(), (weight, bias)
        floats = struct.unpack("=q", struct.pack("=ff", eps, float(plus_one)))[0]
        self._words = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), self.width, floats, int(center))
        self.row_words = (*self._words[:2], floats, int(center))
        self._table = team.table(_FIELDS)
        self._kernel = _norm()

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Normalise every row of ``x`` into ``out`` (which may be ``x``)."""
        if x.shape != out.shape or x.shape[-1] != self.width or x.dtype != torch.float32 or x.stride(-1) != 1 or out.stride(-1) != 1:
            raise ConfigError(f"norm of width {self.width}: x is {x.dtype} {tuple(x.shape)}, out {tuple(out.shape)}")
        if out.dtype not in (torch.float32, torch.bfloat16) or x.dim() not in (2, 3):
            raise ConfigError(f"norm: out is {out.dtype} with {x.dim()} dimensions")
        inner = 1 if x.dim() == 2 else x.shape[1]
        rows = x.shape[0] * inner
        strides = (x.stride(0), x.stride(-2), out.stride(0), out.stride(-2))
        table = self._table.set(*self._words, x.data_ptr(), out.data_ptr(), int(out.dtype == torch.bfloat16), rows, inner, *strides)
        self.team.run(self._kernel, table, 8 * rows * self.width)


def rmsnorm(team: Team, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, plus_one: bool = False) -> None:
    """One RMS norm without binding, see `Norm`."""
    Norm(team, weight, eps, plus_one)(x, out)


def layernorm(team: Team, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
    """One layer norm without binding, see `Norm`."""
    Norm(team, weight, eps, bias=bias, center=True)(x, out)
