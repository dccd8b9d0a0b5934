"""A linear layer: a name, output segments (q|k|v, gate|up), its packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from presage.layers.ops import Ops


class Linear:
    """``x @ W.T + b`` with several checkpoint matrices fused row-wise; ``segments`` are their output widths in order.

    ``act`` is applied to the output: "" none, "gelu_tanh" ... elementwise; "silu_mul", "gelu_tanh_mul" ... take [gate; up] and give
    act(gate) * up, so the output has half the columns. ``softcap`` c > 0 makes outputs c tanh(y / c). Accumulation is float32, whatever
    the input's type.
    """

    def __init__(
        self,
        ops: Ops,
        name: str,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None] = (),
        act: str = "",
        softcap: float = 0.0,
    ) -> None:
        self.name, self.act, self.softcap = name, act, softcap
        self.segments = tuple(w.shape[0] for w in weights)
        self.cols, self.inner = sum(self.segments), weights[0].shape[1]
        self.bias = _fuse_biases(biases, self.segments)
        if act.endswith("_mul"):
            gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
            self.cols //= 2
            self.packed: Any = ops.pack_gate_up(gate, up)
        else:
            self.packed = ops.pack(weights[0] if len(weights) == 1 else torch.cat(list(weights)))
        self._call = ops.linear

    def __call__(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [t, inner] -> ``out`` [t, cols] (float32 or bfloat16); ``residual`` [t, cols] float32 is added (it may be ``out``)."""
        self._call(x, self.packed, out, self.bias, residual, self.act, self.softcap)
        return out


def _fuse_biases(biases: Sequence[torch.Tensor | None], segments: tuple[int, ...]) -> torch.Tensor | None:
    if all(b is None for b in biases):
        return None
    parts = [torch.zeros(n) if b is None else b.float() for b, n in zip(biases, segments, strict=True)]
    return torch.cat(parts).contiguous()
