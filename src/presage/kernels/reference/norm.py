"""Plain-torch twins of the norms. Differentiable."""

from __future__ import annotations

import torch


def _give(y: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is not None:
        out.copy_(y.detach())
    return y


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None, plus_one: bool = False) -> torch.Tensor:
    """x [..., d] / sqrt(mean(x^2) + eps) * weight (or 1 + weight), in x's type."""
    scale = weight + 1 if plus_one else weight
    return _give(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale, out)


def layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    y = x - x.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight
    return _give(y if bias is None else y + bias, out)
