"""What the walk needs beside the plan: model, KV, workspace, and the bank of rows that wait between steps."""

from __future__ import annotations

import torch

from presage.core.errors import StepFailed
from presage.execute.batch import Batch
from presage.layers.kv.plain import PlainKV
from presage.layers.state import LayerContext, Workspace
from presage.models.base import Model


class Bank:
    """Residual rows kept between steps, by (slot, start, layer): a chunk that stopped below a layer goes on from there later.

    Rows are copies, so no step sees another's buffers. ``nbytes`` is what ``Budget.carry`` prices.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, int], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(h.numel() * h.element_size() for h in list(self._rows.values()))

    def put(self, slot: int, start: int, layer: int, h: torch.Tensor) -> None:
        """Keep h [count, d] of a chunk that has run the layers below ``layer``; replaces an earlier copy."""
        self._rows[slot, start, layer] = h.clone()

    def take(self, slot: int, start: int, layer: int, count: int) -> torch.Tensor:
        """The rows put at the same place. Raises StepFailed if they are not there or are not ``count``."""
        h = self._rows.pop((slot, start, layer), None)
        if h is None or len(h) != count:
            have = "none" if h is None else str(len(h))
            raise StepFailed(f"slot {slot}: no {count} rows from token {start} wait at layer {layer} (found {have})")
        return h

    def drop(self, slot: int) -> None:
        """Forget a slot's rows: its request ended, or starts again."""
        for key in [key for key in list(self._rows) if key[0] == slot]:
            self._rows.pop(key, None)


class Run:
    """Everything of an executor that steps share. Used by one thread."""

    def __init__(self, model: Model, kv: PlainKV) -> None:
        self.model, self.kv, self.ops = model, kv, model.ops
        self.work, self.bank = Workspace(), Bank()

    def context(self, layer: int, batch: Batch) -> LayerContext:
        """The context of a layer for a (sub)batch."""
        return LayerContext(layer, batch, self.kv.layers[layer], self.ops, self.work)
