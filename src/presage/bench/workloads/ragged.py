"""Rows of different lengths in two arrays: ``values`` one after another and ``offset`` [n + 1] where each row begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """``row(i)`` is ``values[offset[i] : offset[i + 1]]``."""

    offset: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray], dtype: type = np.int64) -> Ragged:
        """From rows; an empty row means that nothing is known."""
        kept: list[np.ndarray] = [np.asarray(r, dtype) for r in rows]
        offset = np.zeros(len(kept) + 1, np.int64)
        np.cumsum([len(r) for r in kept], out=offset[1:])
        return cls(offset, np.concatenate(kept) if kept else np.empty(0, dtype))

    def __len__(self) -> int:
        return len(self.offset) - 1

    def row(self, i: int) -> np.ndarray:
        """A view of one row."""
        return self.values[self.offset[i] : self.offset[i + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """The chosen rows, in that order."""
        sizes = np.diff(self.offset)[rows]
        offset = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sizes, out=offset[1:])
        at = np.repeat(self.offset[rows] - offset[:-1], sizes) + np.arange(offset[-1])
        return Ragged(offset, self.values[at])
