"""A linear layer: a name, output segments (q|k|v, gate|up), its packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from presage.core.errors import CheckpointError
from presage.layers.norm import Norm
from presage.layers.ops import Ops, Weight
from presage.quantize.canonical import Canonical, fuse
from presage.quantize.planned import Planned


class Linear:
    """``x @ W.T + b`` with several checkpoint matrices fused row-wise; ``segments`` are their output widths in order.

    Weights are dense or quantised (``Canonical``); segments quantised in different ways keep their own (one call each).
    ``act`` is applied to the output: "" none, "gelu_tanh" ... elementwise; "silu_mul", "gelu_tanh_mul" ... take [gate; up] and give
    act(gate) * up, so the output has half the columns. ``softcap`` c > 0 makes outputs c tanh(y / c). Accumulation is float32 or exact,
    whatever the input's type. Raises CheckpointError for a gate and an up that are quantised differently.
    """

    def __init__(
        self,
        ops: Ops,
        name: str,
        weights: Sequence[Weight],
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
            if not _alike(gate, up):
                raise CheckpointError(f"{name}: gate and up are quantised in different ways")
            self.cols //= 2
            self._parts: list[tuple[Any, int, int]] = [(ops.pack_gate_up(gate, up), 0, self.cols)]
        else:
            self._parts = []
            for run in _runs(weights):
                start = self._parts[-1][2] if self._parts else 0
                self._parts.append((ops.pack(run), start, start + run.shape[0]))
        self._call, self._whole = ops.linear, self._parts[0][0] if len(self._parts) == 1 else None

    @property
    def packs(self) -> list[Any]:
        """The packed weights, in order of their outputs."""
        return [packed for packed, _, _ in self._parts]

    def __call__(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None, norm: Norm | None = None) -> torch.Tensor:
        """``norm(x)`` [t, inner] -> ``out`` [t, cols] (float32 or bfloat16); ``residual`` [t, cols] float32 is added (it may be ``out``).

        With a ``norm``, x is the float32 residual stream.
        """
        bound = None if norm is None else norm.bound
        if self._whole is not None:
            self._call(x, self._whole, out, self.bias, residual, self.act, self.softcap, bound)
            return out
        for packed, start, stop in self._parts:
            part, bias = out[:, start:stop], None if self.bias is None else self.bias[start:stop]
            self._call(x, packed, part, bias, None if residual is None else residual[:, start:stop], self.act, self.softcap, bound)
        return out


def _alike(a: Weight, b: Weight) -> bool:
    if isinstance(a, Canonical) and isinstance(b, Canonical):
        return a.alike(b)
    if isinstance(a, Planned) and isinstance(b, Planned):
        return a.alike(b)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)


def _runs(weights: Sequence[Weight]) -> list[Weight]:
    """Neighbours that can be one weight, fused."""
    runs: list[list[Weight]] = []
    for w in weights:
        if runs and _alike(runs[-1][0], w):
            runs[-1].append(w)
        else:
            runs.append([w])
    return [_fused(run) for run in runs]


def _fused(run: list[Weight]) -> Weight:
    if len(run) == 1:
        return run[0]
    if isinstance(run[0], Canonical):
        return fuse([w for w in run if isinstance(w, Canonical)])
    if isinstance(run[0], Planned):
        return Planned(tuple(p for w in run if isinstance(w, Planned) for p in w.parts), run[0].scheme)
    return torch.cat([w for w in run if isinstance(w, torch.Tensor)])


def _fuse_biases(biases: Sequence[torch.Tensor | None], segments: tuple[int, ...]) -> torch.Tensor | None:
    if all(b is None for b in biases):
        return None
    parts = [torch.zeros(n) if b is None else b.float() for b, n in zip(biases, segments, strict=True)]
    return torch.cat(parts).contiguous()
