"""Gemma 3 (text): Gemma 2 with q and k norms instead of caps, and two rotaries, local and global (arXiv 2503.19786)."""

from __future__ import annotations

from presage.layers.attention import QKNorm
from presage.models.gemma2 import Family as Gemma2


class Family(Gemma2):
    """The text half of a ``gemma3`` checkpoint is found under its nested name."""

    roots = ("model.", "language_model.model.", "model.language_model.", "")

    def qk_norm(self, i: int) -> QKNorm:
        """Norms of queries and keys."""
        return QKNorm.of(self.weights.tensor("q_norm", i), self.weights.tensor("k_norm", i), self.params.eps, self.norm_offset)
