"""Gemma 2: norms around both halves, soft-capped scores and logits, every other layer a window (arXiv 2408.00118)."""

from __future__ import annotations

from presage.layers.decoder import DecoderLayer
from presage.models.base import Model
from presage.models.weights import LLAMA_NAMES


class Family(Model):
    """Sandwich norms stored as w - 1. Embedding scale, caps, score scale and windows come from the parameters."""

    norm_offset = 1.0
    names = LLAMA_NAMES | {
        "norm1_after": "model.layers.{i}.post_attention_layernorm",
        "norm2": "model.layers.{i}.pre_feedforward_layernorm",
        "norm2_after": "model.layers.{i}.post_feedforward_layernorm",
    }

    def layer(self, i: int) -> DecoderLayer:
        """Layer i with its norms where this family has them."""
        attention = self.attention(i, self.norm("norm1", i), self.norm("norm1_after", i))
        return DecoderLayer(attention, self.mlp(i, self.norm("norm2", i), self.norm("norm2_after", i)))
