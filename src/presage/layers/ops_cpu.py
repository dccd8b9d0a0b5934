"""Layer operations on the SIMD kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from presage.kernels.cpu import linear as kernels
from presage.kernels.cpu.activation import embedding, moe_combine
from presage.kernels.cpu.attention import AttentionBatch, PagedAttention
from presage.kernels.cpu.kv_copy import CacheCopies
from presage.kernels.cpu.norm import Norm
from presage.kernels.cpu.pack import pack, pack_gate_up
from presage.kernels.cpu.rope import RopeWrite
from presage.kernels.cpu.team import Team
from presage.layers.ops import Arrays, BoundAttention, BoundNorm, BoundWrite, Copies, Maybe

if TYPE_CHECKING:
    from presage.execute.batch import Batch, Table


class CpuOps:
    """One team of ``threads`` threads for all kernels of an engine."""

    kind = "cpu"

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        self.dtype, self.threads, self.team = dtype, threads, Team(threads)
        self._format = "bf16" if dtype == torch.bfloat16 else "f32"

    def pack(self, weight: torch.Tensor) -> Any:
        return pack(weight, self._format, team=self.team)

    def pack_gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> Any:
        return pack_gate_up(gate, up, self._format, team=self.team)

    def pack_experts(self, packs: list[Any]) -> Any:
        return kernels.Experts(packs)

    def linear(
        self, x: torch.Tensor, packed: Any, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float
    ) -> None:
        kernels.linear(self.team, x, packed, out, bias=bias, residual=residual, act=act or None, softcap=softcap)

    def grouped_linear(self, x: torch.Tensor, experts: Any, offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        kernels.grouped_linear(self.team, x, experts, offsets, out, act=act or None)

    def norm(self, weight: torch.Tensor, bias: Maybe, eps: float, center: bool) -> BoundNorm:
        return Norm(self.team, weight, eps, bias=bias, center=center)

    def rope_write(
        self, keys: torch.Tensor, values: torch.Tensor, cos_sin: Maybe, q_norm: Maybe, k_norm: Maybe, eps: float
    ) -> BoundWrite:
        return RopeWrite(self.team, keys, values, cos_sin, q_norm, k_norm, eps)

    def attention(self, keys: torch.Tensor, values: torch.Tensor, heads: int, scale: float, window: int, softcap: float) -> BoundAttention:
        return PagedAttention(self.team, keys, values, heads, scale, window, softcap)

    def views(self, table: Table, batch: Batch) -> Any:
        b = batch
        return AttentionBatch(table.indptr, table.blocks, b.span_of, b.index, b.linear, b.kv_len, b.tree, b.positions, b.max_kv)

    def moe_combine(self, parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> None:
        moe_combine(self.team, parts, inverse, weight, h)

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        embedding(self.team, ids, table, out, scale)

    def copies(self, arrays: Arrays) -> Copies:
        return CacheCopies(self.team, arrays)
