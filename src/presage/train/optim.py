"""Muon for matrices, AdamW for embeddings and norms.

Muon (K. Jordan et al., 2024): momentum, then the nearest orthogonal matrix by five Newton-Schulz steps, so that every direction of a
weight matrix moves alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps and decoupled weight decay, for 2-D parameters."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["velocity"] = torch.zeros_like(p)
                velocity = state["velocity"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonalise(p.grad.add(velocity, alpha=group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # Tall matrices need larger steps for the same change of their output.
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(g: Tensor) -> Tensor:
    """The matrix with g's singular vectors and singular values near 1 (between about 0.7 and 1.2), by a quintic iteration."""
    a, b, c = NS_COEFFICIENTS
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def make_optimizers(model: nn.Module, muon_lr: float, momentum: float, weight_decay: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices, AdamW on everything else. Each group remembers its peak rate as ``peak``."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in named if p.dim() != 2 or "embed" in n]
    both: list[torch.optim.Optimizer] = [
        Muon(matrices, muon_lr, momentum, weight_decay),
        torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return both
