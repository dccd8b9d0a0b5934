"""Plain-torch twins of the elementwise kernels. Differentiable, except where they write in place."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def _give(y: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is not None:
        out.copy_(y.detach())
    return y


def silu_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up for x [t, 2 ff] = gate | up."""
    gate, up = x.chunk(2, -1)
    return _give(F.silu(gate) * up, out)


def gelu_tanh_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gelu_tanh(gate) * up for x [t, 2 ff] = gate | up."""
    gate, up = x.chunk(2, -1)
    return _give(F.gelu(gate, approximate="tanh") * up, out)


def gelu_tanh(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tanh form of GELU."""
    return _give(F.gelu(x, approximate="tanh"), out)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap), as a new tensor."""
    return cap * torch.tanh(x / cap)


def embedding(ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
    """weight[ids] * scale in f32, [t, d]."""
    return _give(weight[ids.long()].float() * scale, out)


def moe_combine(parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
    """h + sum over ranks j of weight[:, j] * parts[inverse[:, j]], in rank order, as a new tensor [t, d]."""
    total = torch.zeros_like(h)
    for j in range(inverse.shape[1]):
        part = parts[inverse[:, j].long()]
        total = total + (part if weight is None else weight[:, j : j + 1] * part)
    return h + total
