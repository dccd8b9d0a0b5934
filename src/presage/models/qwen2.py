"""Qwen 2 and 2.5: Llama with biases on q, k and v (arXiv 2407.10671); biases are fused where the checkpoint has them."""

from __future__ import annotations

from presage.models.base import Model


class Family(Model):
    """Llama with q, k, v biases and, if switched on, windows on the upper layers."""
