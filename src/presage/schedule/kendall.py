"""Kendall's tau-b: how well one order agrees with another, ties allowed (Kendall 1945)."""

from __future__ import annotations

import numpy as np


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """tau_b = (C - D) / sqrt((n0 - ties in x) (n0 - ties in y)) of two rankings [n]; 0 if one of them is constant. O(n^2), by blocks of rows."""
    n, agree, ties_x, ties_y = len(x), 0, 0, 0
    for a in range(0, n, 256):
        dx, dy = (np.sign(v[a : a + 256, None] - v[None, :]).astype(np.int8) for v in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
        agree += int((dx.astype(np.int64) * dy).sum())
        ties_x += int((dx == 0).sum())
        ties_y += int((dy == 0).sum())
    # Every pair was seen twice and every element once beside itself.
    pairs_x, pairs_y = n * n - ties_x, n * n - ties_y
    return agree / float(np.sqrt(float(pairs_x) * pairs_y)) if pairs_x and pairs_y else 0.0
