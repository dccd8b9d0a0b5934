"""Embeddings from the final hidden states: mean or last token, over any chunking of the prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from presage.core.types import Singles

Pooling = Literal["mean", "last"]


class Pool:
    """Running pools by slot. ``asked`` holds slots whose request wants another pooling than ``kind``.

    A chunk that does not continue the previous one starts the slot's pool anew (preemption, a new request)."""

    def __init__(self, kind: Pooling) -> None:
        self.kind = kind
        self.asked: dict[int, Pooling] = {}
        self._next: dict[int, int] = {}
        self._sum: dict[int, np.ndarray] = {}
        self._count: dict[int, int] = {}

    def add(self, slot: int, start: int, hidden: torch.Tensor) -> Singles:
        """Final hidden states [n, d] float32 of tokens ``start`` .. -> the L2-normalised embedding [d] of everything so far."""
        rows = hidden.double().numpy()
        if start != self._next.get(slot):
            self._sum[slot], self._count[slot] = np.zeros(rows.shape[1]), 0
        self._next[slot] = start + len(rows)
        # One row at a time: the order of the sum is that of the tokens, wherever the prompt was cut.
        total = self._sum[slot] = np.add.accumulate(np.concatenate([self._sum[slot][None], rows]))[-1]
        self._count[slot] += len(rows)
        pooled = rows[-1] if self.asked.get(slot, self.kind) == "last" else total / self._count[slot]
        return (pooled / max(float(np.sqrt(pooled @ pooled)), 1e-12)).astype(np.float32)

    def drop(self, slot: int) -> None:
        """Forget a slot."""
        for table in (self._next, self._sum, self._count, self.asked):
            table.pop(slot, None)  # type: ignore[attr-defined]
