"""The MLP half of a dense layer."""

from __future__ import annotations

from presage.layers.attention import leave
from presage.layers.linear import Linear
from presage.layers.norm import Norm
from presage.layers.state import LayerContext, Stage, State


class MLP:
    """Stage mlp: ``down(act(up(x)))``. The activation, gated or not, belongs to ``up``."""

    def __init__(self, up: Linear, down: Linear, before: Norm | None, after: Norm | None = None) -> None:
        self.up, self.down, self.before, self.after = up, down, before, after
        self.stages: tuple[Stage, ...] = (Stage("mlp", self.mlp, "mlp", "gemm"),)

    def mlp(self, s: State, c: LayerContext) -> None:
        """The whole half."""
        y = self.up(s.h, c.work.take("ff", len(s.h), self.up.cols, c.ops.dtype), norm=self.before)
        leave(self.down, y, self.after, s, c)
