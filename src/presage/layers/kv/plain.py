"""The plain KV method: keys and values in the model's own type or in int8, in blocks of 32 tokens, all of them attended.

Layouts are those of ``kernels.cpu.attention`` in every kernel family. A block of the manager may hold several kernel blocks
(block_size 64 = 2): slot numbers are the same, tables are widened by the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from presage.core.errors import NotEnoughMemory
from presage.core.kv import KVGeometry
from presage.core.plan import Moves
from presage.core.types import Ints
from presage.kernels.cpu.memory import Arena
from presage.kernels.reference.kv_copy import cache_shapes
from presage.layers.attention import Attention
from presage.layers.kv.geometry import kv_groups, stored_dtype
from presage.layers.ops import KERNEL_BLOCK, Copies, Ops
from presage.layers.state import LayerContext, State

if TYPE_CHECKING:
    from presage.models.base import Model

__all__ = ["LayerKV", "PlainKV", "kv_groups"]


class LayerKV:
    """The method bound to one layer: its arrays, its group's table, its rotary, its attention."""

    def __init__(self, ops: Ops, layer: Attention, group: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.spec, self.group, self.keys, self.values = layer.spec, group, keys, values
        self.cols = layer.spec.heads * layer.spec.head_dim
        spec, norm, cos_sin = layer.spec, layer.qk_norm, layer.rope.cos_sin if layer.rope else None
        q_norm, k_norm, eps = (norm.q, norm.k, norm.eps) if norm else (None, None, 1e-6)
        self._write = ops.rope_write(keys, values, cos_sin, q_norm, k_norm, eps)
        self._attend = ops.attention(keys, values, spec.heads, spec.scale, spec.window, spec.softcap)

    def write(self, c: LayerContext, qkv: torch.Tensor) -> torch.Tensor:
        """``qkv`` [t, (Hq + 2 Hkv) D] float32 before norms and rotary -> rotated queries [t, Hq D]; stores k and v at the table's slots."""
        q = c.work.take("q", qkv.shape[0], self.cols, c.ops.dtype)
        self._write(qkv, c.batch.positions, c.batch.tables[self.group].slots, q)
        return q

    def attend(self, c: LayerContext, s: State) -> None:
        """Sets ``s.o`` [t, Hq D] from ``s.q`` over the stored keys and values."""
        if s.q is None:
            return
        out = c.work.take("o", s.q.shape[0], self.cols, c.ops.dtype)
        self._attend(s.q, c.batch.views(self.group), out)
        s.o = out


class PlainKV:
    """Arrays of all layers, stored as ``CacheConfig.kv_cache_dtype`` says. ``layers[i]`` is bound to layer i.

    Raises NotEnoughMemory if they cannot be allocated."""

    def __init__(self, model: Model, geometry: KVGeometry, kv_cache_dtype: str = "auto") -> None:
        self.geometry, self._arena = geometry, Arena()
        self.dtype: torch.dtype = getattr(torch, stored_dtype(kv_cache_dtype, str(model.ops.dtype).removeprefix("torch.")))
        self.layers: list[LayerKV] = [None] * len(model.layers)  # type: ignore[list-item]
        self.groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._copies: list[Copies] = []
        for g, (group, blocks) in enumerate(zip(geometry.groups, geometry.num_blocks, strict=True)):
            tiles = blocks * group.block_tokens // KERNEL_BLOCK
            shared = {slot: self._arrays(tiles, group.heads, group.head_dim) for slot in sorted({slot for _, slot in group.layers})}
            for layer, slot in group.layers:
                self.layers[layer] = LayerKV(model.ops, model.layers[layer].attention, g, *shared[slot])
            self.groups.append([shared[slot] for slot in sorted(shared)])
            self._copies.append(model.ops.copies(self.groups[-1]))

    def _arrays(self, blocks: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        shapes = [torch.Size(shape) for shape in cache_shapes(blocks, heads, dim, self.dtype)]
        try:
            keys, values = (self._arena.take(shape.numel() * self.dtype.itemsize).view(self.dtype).view(shape) for shape in shapes)
        except (OSError, RuntimeError) as error:
            raise NotEnoughMemory(f"cannot allocate {blocks} KV blocks: {error}", param="kv_cache_memory") from error
        return keys, values

    def move(self, moves: Moves) -> None:
        """Whole blocks first (copy-on-write), then single slots (accepted tree paths), each list in its order."""
        for g, copies in enumerate(self._copies):
            mine = moves.group == g
            if mine.any():
                copies.copy_blocks(*self._tiles(g, moves.src[mine], moves.dst[mine]))
            mine = moves.row_group == g
            if mine.any():
                copies.move_slots(torch.from_numpy(moves.row_src[mine]), torch.from_numpy(moves.row_dst[mine]))

    def _tiles(self, group: int, *blocks: Ints) -> list[torch.Tensor]:
        """The kernel blocks of the manager's blocks."""
        ratio = self.geometry.groups[group].block_tokens // KERNEL_BLOCK
        part = torch.arange(ratio)
        return [(torch.from_numpy(b).long()[:, None] * ratio + part).view(-1) for b in blocks]
