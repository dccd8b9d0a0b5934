"""The attention half of a layer: project and write, attend, project back into the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from presage.layers.linear import Linear
from presage.layers.norm import Norm
from presage.layers.rope import Rope
from presage.layers.state import LayerContext, Stage, State


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer's attention is: head counts, score scale, ``window`` 0 = everything, ``softcap`` 0 = none."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Norm weights of queries and keys before the rotary, float32: [D] over each head, or [heads * D] over all heads of the row."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, eps: float, offset: float = 0.0) -> QKNorm:
        """From checkpoint tensors; ``offset`` 1 for families that store w - 1."""
        return cls((q.float() + offset).contiguous(), (k.float() + offset).contiguous(), eps)


class Attention:
    """Stages attn_in, attend, attn_out. ``before`` None: the residual stream goes in as it is; ``after`` norms the output (sandwich)."""

    def __init__(
        self,
        spec: AttentionSpec,
        qkv: Linear,
        o: Linear,
        rope: Rope | None,
        before: Norm | None,
        after: Norm | None = None,
        qk_norm: QKNorm | None = None,
    ) -> None:
        self.spec, self.qkv, self.o, self.rope = spec, qkv, o, rope
        self.before, self.after, self.qk_norm = before, after, qk_norm
        self.stages = (
            Stage("attn_in", self.attn_in, "attn", "gemm"),
            Stage("attend", self.attend, "attn", "attention"),
            Stage("attn_out", self.attn_out, "attn", "gemm"),
        )

    def attn_in(self, s: State, c: LayerContext) -> None:
        """Norm, q|k|v, then the KV method rotates and stores keys and values at the batch's slots."""
        qkv = self.qkv(s.h, c.work.take("qkv", len(s.h), self.qkv.cols, torch.float32), norm=self.before)
        s.q = c.kv.write(c, qkv)

    def attend(self, s: State, c: LayerContext) -> None:
        """Attend the stored keys and values the row may see."""
        c.kv.attend(c, s)

    def attn_out(self, s: State, c: LayerContext) -> None:
        """Back into the residual stream."""
        if s.o is not None:
            leave(self.o, s.o, self.after, s, c)


def enter(norm: Norm | None, s: State, c: LayerContext) -> torch.Tensor:
    """The residual stream as a linear's input [t, d], in the activation type."""
    x = c.work.take("x", s.h.shape[0], s.h.shape[1], c.ops.dtype)
    if norm is not None:
        return norm(s.h, x)
    return x.copy_(s.h)


def leave(linear: Linear, x: torch.Tensor, norm: Norm | None, s: State, c: LayerContext) -> None:
    """h += linear(x), or h += norm(linear(x))."""
    if norm is None:
        linear(x, s.h, residual=s.h)
        return
    y = linear(x, c.work.take("y", s.h.shape[0], s.h.shape[1], torch.float32))
    s.h.add_(norm(y, y))
