"""RMS norm and layer norm with float32 arithmetic; the output is in the type its reader wants."""

from __future__ import annotations

import torch

from presage.layers.ops import Ops


class RMSNorm:
    """``x / rms(x) * w`` (Zhang and Sennrich, arXiv 1910.07467). ``offset`` 1 for families that store w - 1 (Gemma)."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float, offset: float = 0.0) -> None:
        self.weight, self.eps = (weight.float() + offset).contiguous(), eps
        self.bound = ops.norm(self.weight, None, eps, center=False)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``x`` [t, d] float32 -> ``out`` [t, d] in any type; ``out`` may be ``x``."""
        self.bound(x, out)
        return out


class LayerNorm:
    """``(x - mean) / std * w + b``."""

    def __init__(self, ops: Ops, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight.float().contiguous(), bias.float().contiguous(), eps
        self.bound = ops.norm(self.weight, self.bias, eps, center=True)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``x`` [t, d] float32 -> ``out`` [t, d] in any type; ``out`` may be ``x``."""
        self.bound(x, out)
        return out


Norm = RMSNorm | LayerNorm
