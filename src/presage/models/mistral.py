"""Mistral: Llama with a sliding window on every layer (arXiv 2310.06825); the window comes from the parameters."""

from __future__ import annotations

from presage.models.base import Model


class Family(Model):
    """Llama with windows."""
