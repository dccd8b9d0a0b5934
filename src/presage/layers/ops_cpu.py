"""Layer operations on the SIMD kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from presage.kernels.cpu import linear as kernels
from presage.kernels.cpu.activation import embedding, moe_combine
from presage.kernels.cpu.attention import AttentionBatch, PagedAttention, attention_numerics
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.kv_copy import CacheCopies
from presage.kernels.cpu.memory import Arena
from presage.kernels.cpu.norm import Norm
from presage.kernels.cpu.pack import PackedLinear, pack, pack_gate_up
from presage.kernels.cpu.pack_int import pack_int
from presage.kernels.cpu.pack_store import PackStore
from presage.kernels.cpu.pack_x12 import pack_x12
from presage.kernels.cpu.rope import RopeWrite
from presage.kernels.cpu.team import Team
from presage.kernels.errors import KernelArgumentError
from presage.layers.ops import Arrays, BoundAttention, BoundNorm, BoundWrite, Copies, Maybe, Weight
from presage.quantize.canonical import Canonical
from presage.quantize.planned import Planned

if TYPE_CHECKING:
    from presage.execute.batch import Batch, Table


class CpuOps:
    """One team of ``threads`` threads for all kernels of an engine. ``store``: where packed weights of a scheme are kept between starts."""

    kind = "cpu"

    def __init__(self, dtype: torch.dtype, threads: int, store: PackStore | None = None) -> None:
        self.dtype, self.threads, self.team, self._store = dtype, threads, Team(threads), store
        self._arena = Arena() if store is None else store.arena
        self._format = "bf16" if dtype == torch.bfloat16 else "f32"
        self.numerics = f"{self._format}-{current_isa().numerics}|{attention_numerics(dtype)}"

    def pack(self, weight: Weight) -> Any:
        """A weight [N, K] in the family's own order."""
        return self._pack([weight])

    def pack_gate_up(self, gate: Weight, up: Weight) -> Any:
        """Two weights [N, K] of a gated activation."""
        return self._pack([gate, up])

    def _pack(self, weights: Sequence[Weight]) -> PackedLinear:
        planned = [w for w in weights if isinstance(w, Planned)]
        if len(planned) == len(weights):
            if self._store is None:
                return self._arena.settle(pack_planned(planned, self.team))
            return self._store.take(planned[0].shape, len(planned) == 2, lambda: pack_planned(planned, self.team))
        codes = [w for w in weights if isinstance(w, Canonical)]
        if len(codes) == len(weights):
            return self._arena.settle(pack_int(codes, self.team))
        floats = [w for w in weights if isinstance(w, torch.Tensor)]
        if len(floats) != len(weights):
            raise KernelArgumentError("a gate and an up must both be quantised, or neither")
        packed = pack(floats[0], self._format, self.team) if len(floats) == 1 else pack_gate_up(floats[0], floats[1], self._format, self.team)
        return self._arena.settle(packed)

    def pack_experts(self, packs: list[Any]) -> Any:
        """Packed weights of equal shape, for one grouped call."""
        return kernels.Experts(packs)

    def linear(
        self, x: torch.Tensor, packed: Any, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float, norm: Any
    ) -> None:
        """out = epilogue(norm(x) @ W.T); ``residual`` may only be ``out`` itself."""
        kernels.linear(self.team, x, packed, out, bias=bias, residual=residual, act=act or None, softcap=softcap, norm=norm)

    def grouped_linear(self, x: torch.Tensor, experts: Any, offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        """Rows offsets[e] .. offsets[e+1] of x through expert e."""
        kernels.grouped_linear(self.team, x, experts, offsets, out, act=act or None)

    def norm(self, weight: torch.Tensor, bias: Maybe, eps: float, center: bool) -> BoundNorm:
        """RMS norm (``center``: layer norm): call(x, out)."""
        return Norm(self.team, weight, eps, bias=bias, center=center)

    def rope_write(
        self, keys: torch.Tensor, values: torch.Tensor, cos_sin: Maybe, q_norm: Maybe, k_norm: Maybe, eps: float
    ) -> BoundWrite:
        """q and k norms, rotary and cache write: call(qkv, positions, slots, q_out)."""
        return RopeWrite(self.team, keys, values, cos_sin, q_norm, k_norm, eps)

    def attention(self, keys: torch.Tensor, values: torch.Tensor, heads: int, scale: float, window: int, softcap: float) -> BoundAttention:
        """Paged attention: call(q, views, out)."""
        return PagedAttention(self.team, keys, values, heads, scale, window, softcap)

    def views(self, table: Table, batch: Batch) -> Any:
        """What attention reads of a step, bound once per KV group."""
        b = batch
        return AttentionBatch(table.indptr, table.blocks, b.span_of, b.index, b.linear, b.kv_len, b.tree, b.positions, b.max_kv)

    def moe_combine(self, parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> None:
        """h[r] += sum over ranks j, ascending, of weight[r, j] * parts[inverse[r, j]]."""
        moe_combine(self.team, parts, inverse, weight, h)

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """out [t, d] float32 = table[ids] * scale."""
        embedding(self.team, ids, table, out, scale)

    def copies(self, arrays: Arrays) -> Copies:
        """Copies inside the caches of all layers of a group."""
        return CacheCopies(self.team, arrays)


def pack_planned(weights: Sequence[Planned], team: Team | None) -> PackedLinear:
    """One weight, or a gate and an up, packed as their scheme says."""
    if weights[0].scheme.weight_bits == 16:
        return pack_x12([w.dense() for w in weights], team)
    return pack_int([w.quantise(team) for w in weights], team)
