"""OLMo 2: norms after each half only, and one norm over all query (and all key) heads (arXiv 2501.00656)."""

from __future__ import annotations

from presage.layers.attention import QKNorm
from presage.layers.decoder import DecoderLayer
from presage.models.base import Model
from presage.models.weights import LLAMA_NAMES


class Family(Model):
    """Post-norm."""

    names = LLAMA_NAMES | {
        "norm1": "model.layers.{i}.post_attention_layernorm",
        "norm2": "model.layers.{i}.post_feedforward_layernorm",
    }

    def qk_norm(self, i: int) -> QKNorm:
        """Norms of queries and keys."""
        return QKNorm.of(self.weights.tensor("q_norm", i), self.weights.tensor("k_norm", i), self.params.eps, self.norm_offset)

    def layer(self, i: int) -> DecoderLayer:
        """Layer i with its norms where this family has them."""
        return DecoderLayer(self.attention(i, None, self.norm("norm1", i)), self.mlp(i, None, self.norm("norm2", i)))
