"""The batch of one step: flat rows, spans, tables. Nothing is padded, and a subset of rows is again a batch.

Row r of span s sees key j  <=>  j <= index[r] if j < linear[s] else bit (j - linear[s]) of tree[r]. So visibility never depends on a row's
place in the batch, and selecting rows changes nothing for those that stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from presage.core.kv import KVGeometry
from presage.core.plan import BlockTable, StepPlan
from presage.core.types import Ints
from presage.layers.ops import KERNEL_BLOCK, Ops


class Table:
    """One KV group's table: ``indptr`` int32 [S+1], ``blocks`` int32 (kernel blocks), ``slots`` int64 [t] (-1 = not written)."""

    __slots__ = ("blocks", "indptr", "slots")

    def __init__(self, indptr: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        self.indptr, self.blocks, self.slots = indptr, blocks, slots

    @classmethod
    def of(cls, table: BlockTable, block_tokens: int) -> Table:
        """From the plan's table, whose blocks hold ``block_tokens`` tokens."""
        ratio, slots = block_tokens // KERNEL_BLOCK, torch.from_numpy(np.ascontiguousarray(table.slots, np.int64))
        if ratio == 1:
            return cls(_int32(table.indptr), _int32(table.blocks), slots)
        parts = table.blocks[:, None] * ratio + np.arange(ratio)
        return cls(_int32(table.indptr * ratio), _int32(parts.reshape(-1)), slots)


class Batch:
    """Rows: ``ids``, ``positions`` (turn the rotary), ``index`` (place in the KV table), ``span_of``, all int32 [t]; ``tree`` int64 [t, W].

    Spans: ``linear`` (keys below are visible by index) and ``kv_len`` (keys that exist after this step's writes), int32 [S].
    """

    __slots__ = ("_views", "ids", "index", "kv_len", "linear", "max_kv", "ops", "positions", "rows", "span_of", "tables", "tree")

    def __init__(
        self,
        ops: Ops,
        rows: torch.Tensor,
        ids: torch.Tensor,
        positions: torch.Tensor,
        index: torch.Tensor,
        span_of: torch.Tensor,
        linear: torch.Tensor,
        kv_len: torch.Tensor,
        tree: torch.Tensor | None,
        tables: tuple[Table, ...],
        max_kv: int,
    ) -> None:
        self.ops, self.rows, self.ids, self.positions, self.index, self.span_of = ops, rows, ids, positions, index, span_of
        self.linear, self.kv_len, self.tree, self.tables, self.max_kv = linear, kv_len, tree, tables, max_kv
        self._views: list[Any] = [None] * len(tables)

    @classmethod
    def of(cls, plan: StepPlan, ids: Ints, geometry: KVGeometry, ops: Ops) -> Batch:
        """From a plan; ``ids`` [T] are the plan's with every -1 replaced."""
        linear = plan.start + plan.count
        kv_len = linear + plan.nodes
        rows = np.arange(len(ids), dtype=np.int64)
        span_of = np.repeat(np.arange(plan.spans, dtype=np.int32), np.diff(plan.rows))
        tree = None if plan.ancestors is None else torch.from_numpy(np.ascontiguousarray(plan.ancestors).view(np.int64))
        tables = tuple(Table.of(t, g.block_tokens) for t, g in zip(plan.tables, geometry.groups, strict=True))
        return cls(
            ops, torch.from_numpy(rows), _int32(ids), _int32(plan.position), _int32(plan.index), torch.from_numpy(span_of),
            _int32(linear), _int32(kv_len), tree, tables, int(kv_len.max()),
        )  # fmt: skip

    def select(self, places: torch.Tensor) -> Batch:
        """The rows at ``places`` (int64, ascending): same spans, fewer rows."""
        tables = tuple(Table(t.indptr, t.blocks, t.slots[places]) for t in self.tables)
        tree = None if self.tree is None else self.tree[places]
        return Batch(
            self.ops, self.rows[places], self.ids[places], self.positions[places], self.index[places], self.span_of[places],
            self.linear, self.kv_len, tree, tables, self.max_kv,
        )  # fmt: skip

    def views(self, group: int) -> Any:
        """What attention binds once per step and KV group."""
        view = self._views[group]
        if view is None:
            view = self._views[group] = self.ops.views(self.tables[group], self)
        return view

    def __len__(self) -> int:
        return self.ids.shape[0]


def _int32(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.int32))
