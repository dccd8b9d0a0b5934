"""Prepacking (arXiv 2404.09529): how many token slots and attention cells a batch of prompts costs by the layout of its rows.

An engine that insists on rectangles pads every prompt to the longest; packing several prompts into a row of that length (first fit,
decreasing) wins most of it back, at the price of a dense mask. Ours has ragged rows and computes neither pads nor masked cells, so the
technique is free here; these counts show what it would be worth elsewhere, priced by any latency model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from presage.core.errors import ConfigError
from presage.core.protocols import LatencyModel
from presage.core.types import Floats

LAYOUTS = ("padded", "sorted", "prepacked", "ragged")


@dataclass(frozen=True)
class Layout:
    """One forward pass over prompts: ``rows`` rectangles of ``columns`` tokens (ragged: 1 row of all), ``slots`` tokens computed,
    ``cells`` query-key pairs visited (before causality), ``prompts`` last tokens with logits."""

    rows: int
    columns: int
    slots: int
    cells: int
    prompts: int

    def features(self) -> Floats:
        """The engine's twelve features of the pass, [12]."""
        f = np.zeros(12)
        f[0] = f[3] = f[6] = self.slots
        f[1], f[5], f[7], f[8] = self.rows, self.prompts, self.cells, 1.0
        return f


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of prompt numbers: longest first, each into the first row with room. Raises ConfigError for a prompt above ``capacity``."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > capacity:
            raise ConfigError(f"a prompt of {lengths[i]} tokens does not fit a row of {capacity}")
        at = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(capacity)
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def layouts(lengths: Sequence[int], kind: str, batch: int = 0) -> list[Layout]:
    """The passes over prompts of ``lengths`` in batches of ``batch`` (0 = one). Raises ConfigError for a kind that is none of ``LAYOUTS``."""
    if kind not in LAYOUTS:
        raise ConfigError(f"unknown layout {kind!r}; known: {', '.join(LAYOUTS)}")
    order = sorted(lengths) if kind == "sorted" else list(lengths)
    size = batch or max(1, len(order))
    return [_layout(order[i : i + size], kind) for i in range(0, len(order), size)]


def _layout(part: list[int], kind: str) -> Layout:
    top, n = max(part), len(part)
    if kind == "ragged":
        return Layout(n, top, sum(part), sum(l * l for l in part), n)
    if kind == "prepacked":
        packed = first_fit_decreasing(part, top)
        # Rows are padded to the longest packed row, not to the capacity.
        columns, rows = max(sum(part[i] for i in row) for row in packed), len(packed)
        return Layout(rows, columns, rows * columns, rows * columns**2, n)
    return Layout(n, top, n * top, n * top * top, n)


def prefill_seconds(latency: LatencyModel, lengths: Sequence[int], kind: str, batch: int = 0) -> float:
    """Seconds to prefill the prompts in a layout, by a latency model."""
    return float(latency.predict(np.stack([p.features() for p in layouts(lengths, kind, batch)]))[:, 0].sum())
