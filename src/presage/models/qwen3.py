"""Qwen 3: Llama with an RMS norm on each query and key head before the rotary (arXiv 2505.09388)."""

from __future__ import annotations

from presage.layers.attention import QKNorm
from presage.models.base import Model


class Family(Model):
    """Llama with per-head q and k norms."""

    def qk_norm(self, i: int) -> QKNorm:
        """Norms of queries and keys."""
        return QKNorm.of(self.weights.tensor("q_norm", i), self.weights.tensor("k_norm", i), self.params.eps, self.norm_offset)
