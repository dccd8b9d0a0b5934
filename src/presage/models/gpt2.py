"""GPT-2: learned positions, layer norms, biases everywhere, plain GELU MLP; its matrices are stored transposed (Conv1D)."""

from __future__ import annotations

from typing import Any

import torch

from presage.core.errors import UnsupportedModel
from presage.layers.attention import Attention
from presage.layers.decoder import Half
from presage.layers.mlp import MLP
from presage.layers.norm import LayerNorm, Norm
from presage.models.base import Model
from presage.models.params import Params
from presage.models.weights import Shape, part_shapes
from presage.quantize.canonical import Canonical


class Family(Model):
    """Older files leave out the ``transformer.`` prefix."""

    roots = ("transformer.", "")
    names = {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "norm1": "transformer.h.{i}.ln_1",
        "norm2": "transformer.h.{i}.ln_2",
        "qkv": "transformer.h.{i}.attn.c_attn",
        "o": "transformer.h.{i}.attn.c_proj",
        "up": "transformer.h.{i}.mlp.c_fc",
        "down": "transformer.h.{i}.mlp.c_proj",
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.places = self.weights.tensor("positions").float()

    @classmethod
    def shapes(cls, params: Params) -> dict[str, Shape]:
        """Shapes of the checkpoint's tensors by part."""
        stored = part_shapes(params)
        return stored | {part: stored[part][::-1] for part in ("qkv", "o", "up", "down")}

    def norm(self, part: str, i: int = 0) -> Norm:
        """A layer norm."""
        return LayerNorm(self.ops, self.weights.tensor(part, i), self.weights.tensor(part, i, ".bias"), self.params.eps)

    def matrix(self, part: str, i: int = 0, expert: int = 0) -> torch.Tensor | Canonical:
        """Stored as [inputs, outputs]."""
        w = super().matrix(part, i, expert)
        if isinstance(w, Canonical):
            raise UnsupportedModel("quantised gpt2 checkpoints are not supported", param="model")
        return w if part in ("embed", "head") else w.T

    def attention(self, i: int, before: Norm | None, after: Norm | None = None) -> Attention:
        """The attention half of layer i."""
        return Attention(self.spec(i), self.linear("qkv", ("qkv",), i), self.linear("o", ("o",), i), None, before)

    def mlp(self, i: int, before: Norm | None, after: Norm | None = None) -> Half:
        """The other half of layer i."""
        return MLP(self.linear("up", ("up",), i, act=self.params.act), self.linear("down", ("down",), i), before)

    def embed(self, ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Token plus position embeddings."""
        super().embed(ids, positions, out)
        out.add_(torch.index_select(self.places, 0, positions))
