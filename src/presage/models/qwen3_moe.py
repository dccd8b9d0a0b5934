"""Qwen 3 MoE: Qwen 3's attention with many small experts; some layers may stay dense."""

from __future__ import annotations

from presage.layers.decoder import Half
from presage.layers.norm import Norm
from presage.models.experts import expert_half
from presage.models.qwen3 import Family as Qwen3
from presage.models.weights import LLAMA_NAMES


class Family(Qwen3):
    """Qwen 3 with experts where the parameters say so."""

    names = LLAMA_NAMES | {
        "router": "model.layers.{i}.mlp.gate",
        "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
        "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj",
        "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    }

    def mlp(self, i: int, before: Norm | None, after: Norm | None = None) -> Half:
        """The other half of layer i."""
        return super().mlp(i, before, after) if self.params.moe[i] is None else expert_half(self, i, before)
