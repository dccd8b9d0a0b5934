"""Layer operations on the plain-torch twins: slow, plain, the truth that kernels are compared with."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from presage.kernels.reference import activation as activation_twin
from presage.kernels.reference import attention as attention_twin
from presage.kernels.reference import kv_copy
from presage.kernels.reference import linear as linear_twin
from presage.kernels.reference import norm as norm_twin
from presage.kernels.reference import rope as rope_twin
from presage.layers.ops import Arrays, BoundAttention, BoundNorm, BoundWrite, Copies, Maybe, Weight
from presage.quantize.canonical import Canonical, fuse
from presage.quantize.planned import Planned

if TYPE_CHECKING:
    from presage.execute.batch import Batch, Table


class ReferenceOps:
    """Runs in the calling thread."""

    kind, threads, numerics, team = "reference", 1, "torch", None

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def pack(self, weight: Weight) -> Any:
        """A weight [N, K] in the family's own order."""
        w = _settled(weight)
        return w if isinstance(w, Canonical) else w.to(self.dtype)

    def pack_gate_up(self, gate: Weight, up: Weight) -> Any:
        """Two weights [N, K] of a gated activation."""
        g, u = _settled(gate), _settled(up)
        if isinstance(g, Canonical) and isinstance(u, Canonical):
            return fuse([g, u])
        return torch.cat([w.unpack() if isinstance(w, Canonical) else w for w in (g, u)]).to(self.dtype)

    def pack_experts(self, packs: list[Any]) -> Any:
        """Packed weights of equal shape, for one grouped call."""
        return packs

    def linear(
        self, x: torch.Tensor, packed: Any, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float, norm: Any
    ) -> None:
        """out = epilogue(norm(x) @ W.T); ``residual`` may only be ``out`` itself."""
        if norm is not None:
            y = torch.empty(x.shape, dtype=torch.float32 if isinstance(packed, Canonical) else self.dtype)
            norm(x, y)
            x = y
        out.copy_(linear_twin.linear(x, packed, bias=bias, residual=residual, act=act or None, softcap=softcap))

    def grouped_linear(self, x: torch.Tensor, experts: Any, offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        """Rows offsets[e] .. offsets[e+1] of x through expert e."""
        out.copy_(linear_twin.grouped_linear(x, experts, offsets, act=act or None))

    def norm(self, weight: torch.Tensor, bias: Maybe, eps: float, center: bool) -> BoundNorm:
        """RMS norm (``center``: layer norm): call(x, out)."""
        if center:
            return lambda x, out: norm_twin.layernorm(x, weight, bias, eps, out)
        return lambda x, out: norm_twin.rmsnorm(x, weight, eps, out)

    def rope_write(
        self, keys: torch.Tensor, values: torch.Tensor, cos_sin: Maybe, q_norm: Maybe, k_norm: Maybe, eps: float
    ) -> BoundWrite:
        """q and k norms, rotary and cache write: call(qkv, positions, slots, q_out)."""
        def write(qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, q_out: torch.Tensor) -> None:
            """Norms, rotary, cache write."""
            q = q_out.view(len(q_out), -1, kv_copy.heads_of(values)[1])
            rope_twin.rope_write(qkv, positions, cos_sin, q, keys, values, slots, q_norm, k_norm, eps)

        return write

    def attention(self, keys: torch.Tensor, values: torch.Tensor, heads: int, scale: float, window: int, softcap: float) -> BoundAttention:
        """Paged attention: call(q, views, out)."""
        def attend(q: torch.Tensor, views: partial[torch.Tensor], out: torch.Tensor) -> None:
            """Every span by itself."""
            views(q.view(len(q), heads, -1), keys, values, out=out, scale=scale, window=window, softcap=softcap)

        return attend

    def views(self, table: Table, batch: Batch) -> Any:
        """What attention reads of a step, bound once per KV group."""
        b = batch
        return partial(
            attention_twin.paged_attention, indptr=table.indptr, blocks=table.blocks, span_of=b.span_of, index=b.index, linear=b.linear,
            kv_len=b.kv_len, tree=b.tree, position=b.positions,
        )  # fmt: skip

    def moe_combine(self, parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> None:
        """h[r] += sum over ranks j, ascending, of weight[r, j] * parts[inverse[r, j]]."""
        h.copy_(activation_twin.moe_combine(parts, inverse, weight, h))

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """out [t, d] float32 = table[ids] * scale."""
        activation_twin.embedding(ids, table, out, scale)

    def copies(self, arrays: Arrays) -> Copies:
        """Copies inside the caches of all layers of a group."""
        return TwinCopies(arrays)


def _settled(weight: Weight) -> torch.Tensor | Canonical:
    """What was to be quantised is; packing without loss means nothing to a twin."""
    if not isinstance(weight, Planned):
        return weight
    return weight.dense() if weight.scheme.weight_bits == 16 else weight.quantise()


class TwinCopies:
    """Copies with plain indexing."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def copy_blocks(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Whole kernel blocks, int64 ids."""
        kv_copy.copy_blocks(self._arrays, src, dst)

    def move_slots(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Single tokens, int64 slots."""
        kv_copy.move_slots(self._arrays, src, dst)
