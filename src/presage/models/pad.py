"""Heads whose size is no multiple of 16 get zero dimensions: kernels work in lanes of 16, and a zero dimension changes no score.

Rotary stays on the true dimensions (they come first), so only the rows of q, k, v and the columns of o grow.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from presage.core.errors import UnsupportedModel
from presage.models.params import Params
from presage.models.weights import Weights

LANES = 16


def padded(params: Params, weights: Weights) -> tuple[Params, Weights]:
    """Both as they are if the head size fits, else widened. Raises UnsupportedModel for fused qkv or normed heads of such a size."""
    if params.head_dim % LANES == 0:
        return params, weights
    if not weights.knows("q") or weights.has("q_norm"):
        raise UnsupportedModel(f"{params.model_type}: head_dim {params.head_dim} is no multiple of {LANES}")
    return replace(params, head_dim=-(-params.head_dim // LANES) * LANES), WideHeads(weights, params)


class WideHeads(Weights):
    """Weights with q, k, v, o widened as they are read."""

    def __init__(self, inner: Weights, params: Params) -> None:
        self._inner, self._dim = inner, params.head_dim

    def knows(self, part: str) -> bool:
        """Does the family have such a part?"""
        return self._inner.knows(part)

    def has(self, part: str, layer: int = 0, suffix: str = ".weight") -> bool:
        """Is the tensor in the checkpoint?"""
        return self._inner.has(part, layer, suffix)

    def get(self, part: str, layer: int = 0, suffix: str = ".weight", expert: int = 0) -> torch.Tensor:
        """One tensor, widened if it belongs to heads."""
        tensor = self._inner.get(part, layer, suffix, expert)
        if part in ("q", "k", "v"):
            return self._widen(tensor, 0)
        return self._widen(tensor, 1) if part == "o" and suffix == ".weight" else tensor

    def _widen(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        heads = tensor.unflatten(axis, (-1, self._dim))
        shape = list(heads.shape)
        shape[axis + 1] = -self._dim % LANES
        return torch.cat([heads, heads.new_zeros(shape)], axis + 1).flatten(axis, axis + 1)
