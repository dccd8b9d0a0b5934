"""GPT-2: learned positions, layer norms, biases everywhere, plain GELU MLP; its matrices are stored transposed (Conv1D)."""

from __future__ import annotations

import torch

from presage.layers.attention import Attention
from presage.layers.decoder import Half
from presage.layers.linear import Linear
from presage.layers.mlp import MLP
from presage.layers.norm import LayerNorm, Norm
from presage.models.base import Model
from presage.models.params import Params
from presage.models.weights import Shape, part_shapes


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

    @classmethod
    def shapes(cls, params: Params) -> dict[str, Shape]:
        stored = part_shapes(params)
        return stored | {part: stored[part][::-1] for part in ("qkv", "o", "up", "down")}

    def norm(self, part: str, i: int = 0) -> Norm:
        return LayerNorm(self.ops, self.weights.get(part, i), self.weights.get(part, i, ".bias"), self.params.eps)

    def linear(self, name: str, parts: tuple[str, ...], i: int, act: str = "") -> Linear:
        w = self.weights
        return Linear(self.ops, name, [w.get(p, i).T for p in parts], [w.maybe(p, i) for p in parts], act)

    def attention(self, i: int, before: Norm | None, after: Norm | None = None) -> Attention:
        return Attention(self.spec(i), self.linear("qkv", ("qkv",), i), self.linear("o", ("o",), i), None, before)

    def mlp(self, i: int, before: Norm | None, after: Norm | None = None) -> Half:
        return MLP(self.linear("up", ("up",), i, act=self.params.act), self.linear("down", ("down",), i), before)

    def embed(self, ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        super().embed(ids, positions, out)
        if not hasattr(self, "_places"):
            self._places = self.weights.get("positions").float()
        out.add_(self._places[positions.long()])
