"""Phi 3 and 4: Llama whose checkpoint already fuses q|k|v and gate|up (arXiv 2404.14219)."""

from __future__ import annotations

from presage.layers.attention import Attention
from presage.layers.decoder import Half
from presage.layers.mlp import MLP
from presage.layers.norm import Norm
from presage.models.base import Model
from presage.models.weights import LLAMA_NAMES


class Family(Model):
    """Partial rotary and longrope come from the parameters."""

    names = LLAMA_NAMES | {"qkv": "model.layers.{i}.self_attn.qkv_proj", "gate_up": "model.layers.{i}.mlp.gate_up_proj"}

    def attention(self, i: int, before: Norm | None, after: Norm | None = None) -> Attention:
        """The attention half of layer i."""
        return Attention(self.spec(i), self.linear("qkv", ("qkv",), i), self.linear("o", ("o",), i), self.rope(i), before, after)

    def mlp(self, i: int, before: Norm | None, after: Norm | None = None) -> Half:
        """The other half of layer i."""
        up = self.linear("gate_up", ("gate_up",), i, act=f"{self.params.act}_mul")
        return MLP(up, self.linear("down", ("down",), i), before, after)
