"""A decoder layer is its stages: those of its attention half, then those of its MLP or expert half."""

from __future__ import annotations

from typing import Protocol

from presage.layers.attention import Attention
from presage.layers.state import LayerContext, Stage, State


class Half(Protocol):
    """Anything made of stages (MLP, experts)."""

    stages: tuple[Stage, ...]


class DecoderLayer:
    """``stages`` in order of execution; ``spec`` tells the KV method what to attend."""

    def __init__(self, attention: Attention, mlp: Half) -> None:
        self.attention, self.mlp = attention, mlp
        self.spec = attention.spec
        self.stages: tuple[Stage, ...] = attention.stages + mlp.stages

    def fill(self, s: State, c: LayerContext) -> None:
        """Keys and values only, for rows that will not run this layer."""
        self.attention.attn_in(s, c)
