"""Heads whose size is no multiple of 16 get zero dimensions: kernels work in lanes of 16, and a zero dimension changes no score.

Rotary stays on the true dimensions (they come first), so only the rows of q, k, v and the columns of o grow.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from presage.core.errors import UnsupportedModel
from presage.models.params import Params
from presage.models.weights import Weights
from presage.quantize.canonical import Canonical

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

    def name(self, part: str, layer: int = 0, suffix: str = ".weight", expert: int = 0) -> str:
        """The full tensor name of a part."""
        return self._inner.name(part, layer, suffix, expert)

    def get(self, part: str, layer: int = 0, suffix: str = ".weight", expert: int = 0) -> torch.Tensor | Canonical:
        """One tensor, widened if it belongs to heads. Raises UnsupportedModel for one whose groups of inputs would change."""
        found = self._inner.get(part, layer, suffix, expert)
        if part in ("q", "k", "v"):
            # Rows of zeros have scales of zero too, so they mean zero whatever their codes.
            return found.by_row(self._more_rows) if isinstance(found, Canonical) else self._more_rows(found)
        if part != "o" or suffix != ".weight":
            return found
        return self._more_inputs(found, self.name(part, layer)) if isinstance(found, Canonical) else self._widen(found, 1)

    def _more_rows(self, part: torch.Tensor) -> torch.Tensor:
        return self._widen(part, 0)

    def _more_inputs(self, weight: Canonical, name: str) -> Canonical:
        plain = all(part is None for part in (weight.zero, weight.sub, weight.low, weight.perm))
        if weight.group != weight.shape[1] or not plain:
            raise UnsupportedModel(f"{name}: heads of {self._dim} with weights quantised in groups are not supported", param="model")
        codes = self._widen(weight.codes, 1)
        return replace(weight, codes=codes, group=codes.shape[1])

    def _widen(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        heads = tensor.unflatten(axis, (-1, self._dim))
        shape = list(heads.shape)
        shape[axis + 1] = -self._dim % LANES
        return torch.cat([heads, heads.new_zeros(shape)], axis + 1).flatten(axis, axis + 1)
