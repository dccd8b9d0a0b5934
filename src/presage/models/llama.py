"""Llama 1 to 3 and everything shaped like it: the base declaration as it stands."""

from __future__ import annotations

from presage.models.base import Model


class Family(Model):
    """Pre-norm, rotary, gated SiLU."""
