"""`linear`: rows times a packed weight with a fused norm before and epilogue after, and `grouped_linear` for experts.

The bits of a row do not depend on the other rows, on how many there are, or on the number of threads. Calls write into
tensors the caller owns and allocate nothing, except for the scratch of the first call. One caller at a time per weight.
"""

from __future__ import annotations

import struct
from operator import is_
from typing import Any

import torch

from presage.kernels.cpu.epilogue import ADD_F32, STORE_BF16, STORE_F32, activation_code
from presage.kernels.cpu.gemm import WORDS, scratch_bytes
from presage.kernels.cpu.norm import Norm
from presage.kernels.cpu.pack import PackedLinear
from presage.kernels.cpu.prepare import row_bytes, wide_bytes
from presage.kernels.cpu.team import Table, Team
from presage.kernels.errors import KernelArgumentError

_F32, _BF16, _I32, _I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
_ITEMS_PER_THREAD = 4
_GIVEN = (0,) * 11
"""Words of the preparation when rows are used where they lie."""


class CallSite:
    """What a weight's calls share: the table, one weight address per row group, and the groups' first rows."""

    def __init__(self, p: PackedLinear, team: Team) -> None:
        self.team, form = team, p.layout
        self.table: Table = team.table(WORDS)
        # With few column blocks for many threads, rows are split too: the same weight then appears once per part.
        self.parts = max(1, -(-_ITEMS_PER_THREAD * team.threads // p.blocks)) if team.threads > 1 else 1
        self.addresses = torch.full((self.parts,), p.address, dtype=_I64)
        self.offsets = torch.zeros(self.parts + 1, dtype=_I32)
        self.weights_at, self.offsets_at = self.addresses.data_ptr(), self.offsets.data_ptr()
        self.offsets_view = self.offsets.numpy()
        self.rows, self.work = -1, 0
        self.call: tuple[Any, ...] | None = None
        self.wide = wide_bytes(p.k)
        self.sums = scratch_bytes(p.columns)
        self.row_bytes, meta = row_bytes(form, p.k)
        self.x_size = 4 if form.operand == "f32" else 2
        self.units, self.odd = form.units(p.k), 0 if form.filled else p.k % form.unit_k
        self.x_dtype = _F32 if form.operand == "f32" else _BF16
        # Rows must be prepared where they are quantised, summed by group, gathered, or filled up.
        self.always = form.integer or form.zero or p.perm is not None or (form.filled and p.k % form.unit_k > 0)
        self.nbytes = p.nbytes
        self.kernel = p.kernel.address
        self.perm = 0 if p.perm is None else p.perm.data_ptr()
        self.tail = (form.words, meta, p.scales_at)

    def holds(self, *operands: object) -> bool:
        """Is the table still that of a call with these very objects? Steps of one shape use the same buffers: 4 us less a call."""
        call = self.call
        return call is not None and call[8] == self.team.generation and all(map(is_, operands, call))

    def split(self, rows: int) -> None:
        """Set the parts' borders for `rows` rows: equal parts, but none of less than a register tile."""
        size = max(8, -(-rows // self.parts))
        self.offsets_view[:] = [min(rows, i * size) for i in range(self.parts + 1)]
        self.rows = rows

    def rows_at(self, x: torch.Tensor, rows: int, k: int, norm: Norm | None) -> tuple[int, int, int, tuple[int, ...]]:
        """(address and stride of the rows that tiles read, scratch, words of the preparation) for x as given."""
        team, stride = self.team, x.stride(0)
        if norm is None and x.dtype is self.x_dtype and not self.always:
            return x.data_ptr(), stride * self.x_size, team.scratch(self.sums), _GIVEN
        half = x.dtype is _BF16
        words = (x.data_ptr(), stride * (2 if half else 4), half, rows, k, self.perm, *(_GIVEN[:4] if norm is None else norm.row_words))
        return team.shared(rows * self.row_bytes), self.row_bytes, team.scratch(self.sums + self.wide), (*words, self.sums)

    def accepts(self, dtype: torch.dtype, norm: Norm | None, k: int) -> bool:
        """May x be of this type?"""
        if norm is not None:
            return dtype is _F32 and norm.width == k
        return dtype is _F32 or dtype is _BF16


def _site(team: Team, p: PackedLinear) -> CallSite:
    site = p.site
    if site is None or site.team is not team:
        site = p.site = CallSite(p, team)
    return site


def _reject(x: torch.Tensor, p: PackedLinear, out: torch.Tensor, gated: bool) -> None:
    """Say what is wrong with operands that failed the quick check."""
    raise KernelArgumentError(
        f"{p!r}: x {tuple(x.shape)} {x.dtype} strides {x.stride()}, out {tuple(out.shape)} {out.dtype} strides {out.stride()}"
        f"{', gated activation' if gated else ''}: need x [t, {p.k}] of {'bfloat16' if p.fmt == 'bf16' else 'float32'}, out [t, {p.n}]"
        f" of float32 or bfloat16 (float32 for a residual), unit column strides, and a gated activation exactly for a gated weight"
    )


def _mode(p: PackedLinear, out: torch.Tensor, residual: torch.Tensor | None) -> int:
    if residual is None:
        return STORE_F32 if out.dtype is _F32 else STORE_BF16 if out.dtype is _BF16 else -1
    if residual is not out and residual.data_ptr() != out.data_ptr():
        raise KernelArgumentError(f"{p!r}: residual must be out itself; it is added to in place")
    return ADD_F32 if out.dtype is _F32 else -1


def _vector(tensor: torch.Tensor | None, size: int, name: str) -> int:
    """Address of a contiguous f32 vector of `size`, 0 for None."""
    if tensor is None:
        return 0
    if tensor.dtype is not _F32 or tensor.numel() != size or not tensor.is_contiguous():
        raise KernelArgumentError(f"{name} must be {size} contiguous float32, not {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.data_ptr()


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def linear(
    team: Team,
    x: torch.Tensor,
    p: PackedLinear,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str | None = None,
    scale_rows: torch.Tensor | None = None,
    softcap: float = 0.0,
    norm: Norm | None = None,
) -> None:
    """out = epilogue(norm(x) @ weight.T).

    x [t, K] f32 or bf16 (rounded to the format's type; integer formats quantise rows; a `norm` takes f32), out [t, N] f32 or bf16;
    rows may be apart, columns not. `bias` f32 [N] (gated: [2 N], gate first). `act`: None, "silu", "gelu_tanh", "gelu", or these with
    "_mul" for a weight of `pack_gate_up`. `scale_rows` f32 [t] multiplies rows after the activation. `residual`: pass `out` (f32) to add
    to it. `softcap` > 0 caps.
    Raises KernelArgumentError for operands that do not fit.
    """
    site = p.site
    if site is None or site.team is not team:
        site = _site(team, p)
    if site.holds(x, out, bias, residual, act, scale_rows, softcap, norm):
        team.run(site.kernel, site.table.address, site.work)
        return
    rows, k = x.shape
    out_stride, out_unit = out.stride()
    code, gated = activation_code(act) if act else (0, False)
    mode = STORE_F32 if residual is None and out.dtype is _F32 else _mode(p, out, residual)
    if (
        k != p.k
        or out.shape != (rows, p.n)
        or x.stride(1) != 1
        or out_unit != 1
        or not site.accepts(x.dtype, norm, k)
        or mode < 0
        or gated is not p.gated
    ):
        _reject(x, p, out, gated)
    if rows == 0:
        return
    if rows != site.rows:
        site.split(rows)
    x_at, x_stride, scratch, prepare = site.rows_at(x, rows, k, norm)
    site.table.set(
        site.weights_at, site.parts, site.offsets_at, x_at, x_stride, site.units, site.odd, p.blocks,
        p.n, gated, scratch, team.scratch_stride, out.data_ptr(), out_stride, mode,
        _vector(bias, p.n * (1 + gated), "bias") if bias is not None else 0, 0,
        _vector(scale_rows, rows, "scale_rows") if scale_rows is not None else 0, code, softcap > 0, _bits(softcap) if softcap else 0,
        *site.tail, *prepare,
    )  # fmt: skip
    site.work = site.nbytes * (1 + rows // 16)
    site.call = (x, out, bias, residual, act, scale_rows, softcap, norm, team.generation)
    team.run(site.kernel, site.table.address, site.work)


class Experts:
    """The weights of one grouped call: E packed weights of one shape; rows of an address table, so an expert may be replaced."""

    def __init__(self, packs: list[PackedLinear]) -> None:
        first = packs[0]
        if any((p.n, p.k, p.numerics, p.gated) != (first.n, first.k, first.numerics, first.gated) or p.perm is not None for p in packs):
            raise KernelArgumentError("experts of one call must have equal shapes and formats")
        self.packs = packs
        self.addresses = torch.tensor([p.address for p in packs], dtype=_I64)
        self.address: int = self.addresses.data_ptr()

    def replace(self, index: int, p: PackedLinear) -> None:
        """Let expert `index` live elsewhere from the next call on."""
        self.packs[index] = p
        self.addresses[index] = p.address


def grouped_linear(
    team: Team,
    x: torch.Tensor,
    experts: Experts,
    offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    act: str | None = None,
    row_scale: torch.Tensor | None = None,
) -> None:
    """`linear` with another weight per group of rows: rows offsets[e] .. offsets[e+1] of x [t, K] go to expert e.

    `offsets` int32 [E + 1], ascending from 0 to t; empty groups cost nothing. `bias` f32 [E, N] (gated [E, 2 N]), `row_scale` f32 [t].
    A row's bits are those of `linear` with its expert's weight. Raises KernelArgumentError.
    """
    p, count = experts.packs[0], len(experts.packs)
    site = _site(team, p)
    rows, k = x.shape
    code, gated = activation_code(act)
    mode = _mode(p, out, None)
    fits = k == p.k and out.shape == (rows, p.n) and x.stride(1) == 1 and out.stride(1) == 1 and site.accepts(x.dtype, None, k)
    if not fits or mode < 0 or gated is not p.gated:
        _reject(x, p, out, gated)
    if offsets.dtype is not _I32 or offsets.numel() != count + 1 or not offsets.is_contiguous() or int(offsets[-1]) != rows:
        raise KernelArgumentError(f"offsets must be {count + 1} contiguous int32 ending with {rows}")
    if rows == 0:
        return
    width = p.n * (1 + gated)
    x_at, x_stride, scratch, prepare = site.rows_at(x, rows, k, None)
    site.call = None
    address = site.table.set(
        experts.address, count, offsets.data_ptr(), x_at, x_stride, site.units, site.odd, p.blocks, p.n, gated,
        scratch, team.scratch_stride, out.data_ptr(), out.stride(0), mode,
        _vector(bias, width * count, "bias"), width * 4, _vector(row_scale, rows, "row_scale"), code, 0, 0,
        *site.tail, *prepare,
    )  # fmt: skip
    team.run(site.kernel, address, site.nbytes * min(rows, count))
