"""Weights in the order in which the matrix product reads them.

A weight [N, K] becomes column blocks of `columns` outputs (48 with AVX-512), each of planes of 16 outputs. Within a plane, word by
word of K, come that word of its 16 outputs; a word is 4 bytes: two neighbouring bf16, one f32, four int8, or eight 4-bit codes. A tile reads
its planes side by side, ascending: three streams fill a core's memory queue where one did not (25.8 against 22.9 GB/s, Zen 4).
The last block and an odd K are filled with zeros, which are never used as operands of a row (an x of NaN stays in its row).
A gate and an up projection are packed together, half of each block to each, so one tile holds both operands of `act(gate) * up`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.cache import Kernel, device, kernel
from presage.kernels.cpu.gemm import gemm
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.layout import Layout, layout
from presage.kernels.cpu.region import HEADER, claim, enter, leave
from presage.kernels.cpu.simd import get_i32, get_i64, get_u16, set_i32
from presage.kernels.cpu.team import Table, Team
from presage.kernels.errors import KernelArgumentError

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}

_WORDS = 9
_FIRST, _SECOND, _STRIDE, _N, _K_WORDS, _ODD, _OUT, _BLOCKS, _LANES = range(HEADER, HEADER + _WORDS)


class PackedLinear:
    """One weight [n, k] (or a gate and an up of [n, k] each, `gated`), packed for this machine.

    `data`: bf16 [blocks, columns / 16, ceil(k / 2), 16, 2], f32 [blocks, columns / 16, k, 16], integers bytes (`pack_int.py`); `layout`: its
    format; `scales_at`: where in `data` the outputs' scales are (w8); `perm`: int64 [k], order in which inputs are gathered, or None;
    `numerics`: id of everything that decides a result's bits; `site`: the call's preallocated table, made by the first call.
    """

    __slots__ = (
        "address", "blocks", "columns", "data", "fmt", "gated", "k", "kernel", "layout", "n", "numerics", "perm", "scales_at", "site",
    )  # fmt: skip

    def __init__(
        self, data: torch.Tensor, n: int, k: int, form: Layout, gated: bool, scales_at: int = 0, perm: torch.Tensor | None = None
    ) -> None:
        self.data, self.n, self.k, self.fmt, self.gated, self.layout = data, n, k, form.fmt, gated, form
        self.columns, self.scales_at, self.perm = form.columns, scales_at, perm
        self.blocks = -(-n // (form.columns // (2 if gated else 1)))
        self.numerics = form.numerics
        self.kernel: Kernel = gemm(form.fmt)
        self.address: int = data.data_ptr()
        self.site: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes a call reads."""
        return self.data.numel() * self.data.element_size()

    def __repr__(self) -> str:
        return f"PackedLinear({'2 x ' if self.gated else ''}{self.n} x {self.k}, {self.numerics})"


_PIECE = 128
"""Words of a row copied at once: longer reads than a line suit the memory, and 48 rows of it still fit the caches."""


@device
def copy_end(target, source, exists, count, size):  # type: ignore[no-untyped-def]
    """`count` words of a row, 16 words apart, and half a word if `size` is more; zeros if the row does not exist."""
    for i in range(count):
        set_i32(target, i * 16, get_i32(source, i) if exists else 0)
    for i in range(count, size):
        set_i32(target, i * 16, get_u16(source, 2 * i) if exists else 0)


@kernel
def pack_words(columns: int) -> Any:
    """Copy rows of 4-byte words into column blocks."""

    def run(table):  # type: ignore[no-untyped-def]
        enter(table)
        stride, n, out, lanes = get_i64(table, _STRIDE), get_i64(table, _N), get_i64(table, _OUT), get_i64(table, _LANES)
        words, odd = get_i64(table, _K_WORDS), get_i64(table, _ODD)
        plane = (words + odd) * 64
        block = claim(table)
        while block < get_i64(table, _BLOCKS):
            start = out + block * columns // 16 * plane
            for piece in range(0, words + odd, _PIECE):
                for lane in range(columns):
                    second = lane >= lanes
                    row = block * lanes + lane - (lanes if second else 0)
                    source = get_i64(table, _SECOND if second else _FIRST) + row * stride
                    target = start + lane // 16 * plane + lane % 16 * 4
                    for word in range(piece, min(piece + _PIECE, words + odd), 16):
                        to, at = target + word * 64, source + word * 4
                        if row < n and word + 16 <= words:
                            for i in range(16):
                                set_i32(to, i * 16, get_i32(at, i))
                        else:
                            copy_end(to, at, row < n, min(16, words - word), min(16, words + odd - word))
            block = claim(table)
        leave(table)

    return run


def into_planes(sources: tuple[torch.Tensor, ...], n: int, words: int, odd: int, columns: int, team: Team | None) -> torch.Tensor:
    """Rows of 4-byte words as planes, int32 [blocks, columns / 16, words + odd, 16]; two `sources` [n, ...] share each block.

    Sources are contiguous and kept by the caller; `odd` 1 takes another half word of a row.
    """
    lanes = columns // len(sources)
    blocks = -(-n // lanes)
    data = torch.empty((blocks, columns // 16, words + odd, 16), dtype=torch.int32)
    table = team.table(_WORDS) if team else Table(_WORDS, 1)
    row_bytes = sources[0].stride(0) * sources[0].element_size()
    table.set(sources[0].data_ptr(), sources[-1].data_ptr(), row_bytes, n, words, odd, data.data_ptr(), blocks, lanes)
    copy = pack_words(columns)
    if team:
        team.run(copy, table.address, row_bytes * n)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(copy.address)(table.address)
    return data


def _pack(weights: tuple[torch.Tensor, ...], fmt: str, team: Team | None) -> PackedLinear:
    dtype = DTYPES.get(fmt)
    if dtype is None:
        raise ConfigError(f"unknown dense weight format {fmt!r}; known: {', '.join(DTYPES)}", param="fmt")
    first = weights[0]
    if first.ndim != 2 or any(w.shape != first.shape for w in weights) or not first.numel():
        raise KernelArgumentError(f"weights must be equal non-empty matrices, not {[tuple(w.shape) for w in weights]}")
    sources = tuple(w.to(dtype).contiguous() for w in weights)
    (n, k), form = first.shape, layout(fmt)
    words, odd = form.units(k), k % form.unit_k
    planes = into_planes(sources, n, words, odd, form.columns, team).view(dtype)
    data = planes.view(*planes.shape[:3], 16, 2) if fmt == "bf16" else planes
    return PackedLinear(data, n, k, form, len(weights) == 2)


def pack(weight: torch.Tensor, fmt: str, team: Team | None = None) -> PackedLinear:
    """Pack [N, K] as "bf16" or "f32" (converted if it is of another type). One copy is made; free the source afterwards.

    Raises ConfigError for an unknown format, KernelArgumentError for a wrong shape. With a `team` its threads share the work.
    """
    return _pack((weight,), fmt, team)


def pack_gate_up(gate: torch.Tensor, up: torch.Tensor, fmt: str, team: Team | None = None) -> PackedLinear:
    """Pack two [N, K] for a gated activation: `linear(..., act="silu_mul")` then writes [t, N]."""
    return _pack((gate, up), fmt, team)


def unpack(p: PackedLinear) -> torch.Tensor:
    """The weight [n, k] that a dense `p` holds, exactly; of a gated pair [2 n, k], gate first."""
    words = p.data if p.fmt == "bf16" else p.data.unsqueeze(-1)
    rows = words.permute(0, 1, 3, 2, 4).reshape(p.blocks, p.columns, -1)[:, :, : p.k]
    return from_blocks(p, rows)


def from_blocks(p: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
    """Rows by block [blocks, columns, ...] to rows of the weight [n, ...], of a gated pair [2 n, ...]."""
    if not p.gated:
        return rows.reshape(-1, *rows.shape[2:])[: p.n].clone()
    half = p.columns // 2
    return torch.cat([part.reshape(-1, *rows.shape[2:])[: p.n] for part in (rows[:, :half], rows[:, half:])])


def warm_kernels() -> list[Kernel]:
    """The packing of this machine's blocks."""
    return [pack_words(current_isa().tile_columns)]
