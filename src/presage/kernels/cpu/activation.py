"""Elementwise kernels that are not fused into a GEMM: activations, embedding rows, soft caps, and the sum of expert parts."""

from __future__ import annotations

import struct

import numpy as np
import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.cache import Kernel, kernel
from presage.kernels.cpu.epilogue import STORE_BF16, STORE_F32, activate, activation_code, cap_value, put_row
from presage.kernels.cpu.region import HEADER, enter, share, team_size
from presage.kernels.cpu.simd import broadcast_f32, fma, get_f32, get_i32, get_i64, load_bf16_n, load_f32_n, store_f32_n, zero_f32
from presage.kernels.cpu.team import Team

_W = range(HEADER, HEADER + 8)


def _bits(value: float) -> int:
    return int(struct.unpack("=q", struct.pack("=ff", value, 0.0))[0])


def _run(team: Team, function: Kernel, words: tuple[int, ...], work: int) -> None:
    table = team.table(len(words))
    # The name keeps the table's memory until the region is over.
    team.run(function, table.set(*words), work)


@kernel
def _activate(code, gated):  # type: ignore[no-untyped-def]
    """out = act(x), or act(gate) * up for x rows of gate | up."""
    X, X_STRIDE, OUT, OUT_STRIDE, ROWS, WIDTH, MODE = _W[:7]

    def run(table):  # type: ignore[no-untyped-def]
        rank, width, mode = enter(table), get_i64(table, WIDTH), get_i64(table, MODE)
        pieces, size = (width + 15) // 16, 2 if mode == STORE_BF16 else 4
        start, stop = share(get_i64(table, ROWS) * pieces, rank, team_size(table))
        for item in range(start, stop):
            row, d = item // pieces, item % pieces * 16
            n = 16 if width - d > 16 else width - d
            x = get_i64(table, X) + 4 * row * get_i64(table, X_STRIDE)
            y = activate(code, load_f32_n(x, d, n))
            if gated:
                y = y * load_f32_n(x, width + d, n)
            put_row(get_i64(table, OUT) + size * row * get_i64(table, OUT_STRIDE), d, y, n, mode)

    return run


@kernel
def _cap():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank, count, x, cap = enter(table), get_i64(table, HEADER + 1), get_i64(table, HEADER), get_f32(table, 2 * (HEADER + 2))
        start, stop = share((count + 15) // 16, rank, team_size(table))
        for i in range(start, stop):
            n = 16 if count - 16 * i > 16 else count - 16 * i
            store_f32_n(x, 16 * i, cap_value(load_f32_n(x, 16 * i, n), cap), n)

    return run


@kernel
def _embed():  # type: ignore[no-untyped-def]
    IDS, TABLE, OUT, ROWS, WIDTH, HALF, SCALE = _W[:7]

    def run(table):  # type: ignore[no-untyped-def]
        rank, width, half = enter(table), get_i64(table, WIDTH), get_i64(table, HALF)
        scale, pieces = broadcast_f32(get_f32(table, 2 * SCALE)), (width + 255) // 256
        start, stop = share(get_i64(table, ROWS) * pieces, rank, team_size(table))
        for item in range(start, stop):
            row, first = item // pieces, item % pieces * 256
            source = get_i64(table, TABLE) + get_i32(get_i64(table, IDS), row) * width * (2 if half else 4)
            target, last = get_i64(table, OUT) + 4 * row * width, first + 256 if first + 256 < width else width
            for d in range(first, last, 16):
                n = 16 if width - d > 16 else width - d
                x = load_bf16_n(source, d, n) if half else load_f32_n(source, d, n)
                store_f32_n(target, d, x * scale, n)

    return run


@kernel
def _combine():  # type: ignore[no-untyped-def]
    PARTS, INVERSE, WEIGHT, OUT, ROWS, RANKS, WIDTH = _W[:7]

    def run(table):  # type: ignore[no-untyped-def]
        rank, width, ranks = enter(table), get_i64(table, WIDTH), get_i64(table, RANKS)
        parts, inverse, weight = get_i64(table, PARTS), get_i64(table, INVERSE), get_i64(table, WEIGHT)
        pieces = (width + 15) // 16
        start, stop = share(get_i64(table, ROWS) * pieces, rank, team_size(table))
        for item in range(start, stop):
            row, d = item // pieces, item % pieces * 16
            n, total = 16 if width - d > 16 else width - d, zero_f32()
            # Rank order, whatever order the parts were computed in: the sum is the same in every batch.
            for j in range(row * ranks, (row + 1) * ranks):
                part = load_f32_n(parts + 4 * width * get_i32(inverse, j), d, n)
                w = get_f32(weight, j) if weight != 0 else np.float32(1.0)
                total = fma(broadcast_f32(w), part, total)
            out = get_i64(table, OUT) + 4 * row * width
            store_f32_n(out, d, load_f32_n(out, d, n) + total, n)

    return run


class Activation:
    """``act``: silu, gelu_tanh, gelu, or with ``_mul`` the gated form. Raises ConfigError for another name."""

    def __init__(self, team: Team, act: str) -> None:
        code, self.gated = activation_code(act)
        self.team, self._table, self._kernel = team, team.table(7), _activate(code, int(self.gated))

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x f32 [t, ff] (gated: [t, 2 ff], gate | up) -> out f32 or bf16 [t, ff]; rows may be strided."""
        rows, width = out.shape
        if x.shape != (rows, width * (2 if self.gated else 1)) or x.dtype != torch.float32 or x.stride(1) != 1 or out.stride(1) != 1:
            raise ConfigError(f"activation: x is {x.dtype} {tuple(x.shape)}, out {tuple(out.shape)}")
        mode = STORE_BF16 if out.dtype == torch.bfloat16 else STORE_F32
        table = self._table.set(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), rows, width, mode)
        self.team.run(self._kernel, table, 12 * rows * width)


def silu_mul(team: Team, x: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up for x f32 [t, 2 ff] = gate | up."""
    Activation(team, "silu_mul")(x, out)


def gelu_tanh_mul(team: Team, x: torch.Tensor, out: torch.Tensor) -> None:
    """out = gelu_tanh(gate) * up for x f32 [t, 2 ff] = gate | up."""
    Activation(team, "gelu_tanh_mul")(x, out)


def gelu_tanh(team: Team, x: torch.Tensor, out: torch.Tensor) -> None:
    """out = gelu_tanh(x) for x f32 [t, ff] (gpt2)."""
    Activation(team, "gelu_tanh")(x, out)


def softcap(team: Team, x: torch.Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap) in place; x f32, contiguous."""
    if x.dtype != torch.float32 or not x.is_contiguous() or cap <= 0:
        raise ConfigError(f"softcap {cap}: x is {x.dtype} {tuple(x.shape)}")
    _run(team, _cap(), (x.data_ptr(), x.numel(), _bits(cap)), 8 * x.numel())


def embedding(team: Team, ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """out[r] = weight[ids[r]] * scale: ids i32 [t], weight f32 or bf16 [vocab, d], out f32 [t, d]. Ids are not checked against vocab."""
    if ids.dtype != torch.int32 or weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        raise ConfigError(f"embedding: ids {ids.dtype}, weight {weight.dtype}")
    if out.dtype != torch.float32 or out.shape != (ids.numel(), weight.shape[1]) or not out.is_contiguous():
        raise ConfigError(f"embedding: out is {out.dtype} {tuple(out.shape)}")
    half = int(weight.dtype == torch.bfloat16)
    addresses = (ids.data_ptr(), weight.data_ptr(), out.data_ptr())
    _run(team, _embed(), (*addresses, ids.numel(), weight.shape[1], half, _bits(scale)), 8 * out.numel())


def moe_combine(team: Team, parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor | None, h: torch.Tensor) -> None:
    """h[r] += sum over ranks j of weight[r, j] * parts[inverse[r, j]], in rank order.

    parts f32 [n, d] in any order, inverse i32 [t, k] (where the part of token r's j-th expert lies), weight f32 [t, k] or None (already
    applied), h f32 [t, d]. All contiguous.
    """
    rows, ranks = inverse.shape
    for x in (parts, inverse, weight, h):
        if x is not None and (not x.is_contiguous() or x.dtype != (torch.int32 if x is inverse else torch.float32)):
            raise ConfigError(f"moe_combine: got {x.dtype} {tuple(x.shape)}")
    if h.shape != (rows, parts.shape[1]) or (weight is not None and weight.shape != inverse.shape):
        raise ConfigError(f"moe_combine: h {tuple(h.shape)}, parts {tuple(parts.shape)}, inverse {tuple(inverse.shape)}")
    addresses = (parts.data_ptr(), inverse.data_ptr(), 0 if weight is None else weight.data_ptr(), h.data_ptr())
    _run(team, _combine(), (*addresses, rows, ranks, h.shape[1]), 4 * parts.numel() + 8 * h.numel())
