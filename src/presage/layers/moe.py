"""Mixture-of-experts half of a layer: route, experts grouped by segments, combine by rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from presage.layers.attention import enter
from presage.layers.linear import Linear
from presage.layers.norm import Norm
from presage.layers.ops import Ops, Weight
from presage.layers.state import LayerContext, Stage, State


@dataclass(slots=True)
class Routed:
    """The experts of t rows: ``x`` [t, d] their inputs, ``weight`` [t, k] float32 in rank order.

    Pairs (row, rank) sorted by expert: ``order`` int64 [t*k] holds row * k + rank, ``inverse`` int32 [t, k] where a pair lies in it,
    ``offsets`` int32 [E+1] each expert's segment. ``parts`` [t*k, d] float32: the experts' outputs, in that order.
    """

    x: torch.Tensor
    weight: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor
    parts: torch.Tensor | None = None


class Experts:
    """Stages route, experts, combine. A row's bits depend on its own experts only: parts are summed by rank, never by arrival.

    ``gate_up``, ``down``: one entry per router output, taken one by one, so that a checkpoint's experts need not be in memory together.
    """

    def __init__(
        self, ops: Ops, router: Linear, gate_up: Iterable[tuple[Weight, Weight]], down: Iterable[Weight],
        top_k: int, normalise: bool, ff: int, act: str, before: Norm,
    ) -> None:  # fmt: skip
        self.router, self.before, self.top_k, self.normalise, self.act = router, before, top_k, normalise, act
        self.count, self.ff, self.d = router.cols, ff, router.inner
        self.gate_up: Any = ops.pack_experts([ops.pack_gate_up(gate, up) for gate, up in gate_up])
        self.down: Any = ops.pack_experts([ops.pack(w) for w in down])
        self.stages: tuple[Stage, ...] = (
            Stage("route", self.route, "router", "gemm"),
            Stage("experts", self.experts, "experts", "experts"),
            Stage("combine", self.combine, "router", "gemm"),
        )

    def route(self, s: State, c: LayerContext) -> None:
        """Softmax over the router's logits, then the k largest."""
        x = enter(self.before, s, c)
        logits = self.router(x, c.work.take("router", len(x), self.count, torch.float32))
        weight, ids = torch.topk(torch.softmax(logits, -1), self.top_k, -1)
        if self.normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        s.moe = grouped(x, weight.contiguous(), ids, self.count)

    def experts(self, s: State, c: LayerContext) -> None:
        """Every expert on its segment of rows; all segments in one grouped call per matrix."""
        r = s.moe
        if r is None:
            return
        n = len(r.order)
        x = torch.index_select(r.x, 0, r.order // self.top_k)
        y = c.work.take("expert_ff", n, self.ff, c.ops.dtype)
        c.ops.grouped_linear(x, self.gate_up, r.offsets, y, self.act)
        r.parts = c.work.take("expert_parts", n, self.d, torch.float32)
        c.ops.grouped_linear(y, self.down, r.offsets, r.parts, "")

    def combine(self, s: State, c: LayerContext) -> None:
        """h += sum over ranks of weight * part, rank 0 first."""
        r = s.moe
        if r is not None and r.parts is not None:
            c.ops.moe_combine(r.parts, r.inverse, r.weight, s.h)
        s.moe = None


def grouped(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, count: int) -> Routed:
    """Sort the (row, rank) pairs of ``ids`` int64 [t, k] by expert; within an expert they stay in row order."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty(len(flat), dtype=torch.int32)
    inverse[order] = torch.arange(len(flat), dtype=torch.int32)
    offsets = torch.zeros(count + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(flat, minlength=count).cumsum(0)
    return Routed(x, weight, order, inverse.view_as(ids), offsets)
