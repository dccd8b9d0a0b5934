"""Mixtral: Mistral's attention with top-2 of 8 experts (arXiv 2401.04088)."""

from __future__ import annotations

from presage.layers.decoder import Half
from presage.layers.norm import Norm
from presage.models.base import Model
from presage.models.experts import expert_half
from presage.models.weights import LLAMA_NAMES


class Family(Model):
    """Llama with experts. w1 is the gate, w3 the up and w2 the down projection."""

    names = LLAMA_NAMES | {
        "router": "model.layers.{i}.block_sparse_moe.gate",
        "expert_gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "expert_up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
        "expert_down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
    }

    def mlp(self, i: int, before: Norm | None, after: Norm | None = None) -> Half:
        """The other half of layer i."""
        return expert_half(self, i, before)
