"""Log-probabilities of chosen ids and of the most likely ones, from raw logits, without sorting a row."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.core.request import TokenLogprobs
from presage.core.types import Ints, Singles
from presage.execute.sampling.noise import block_peaks
from presage.execute.sampling.select import top_k_rows
from presage.execute.sampling.vecmath import BLOCK, exp_neg, f32, i32, key_float


@njit("void(f4[:,::1],i4[::1],f8[::1],i8[::1])", cache=True, nogil=True, error_model="numpy")
def _norm_and_rank(x: Any, ids: Any, norm: Any, rank: Any) -> None:
    """Per row: log of the sum of exp, and the place of the id (1 = most likely; equals rank by id)."""
    peaks = np.empty((x.shape[1] + BLOCK - 1) // BLOCK, np.int32)
    for r in range(len(ids)):
        row, mine = x[r], x[r, ids[r]]
        top, _, _ = block_peaks(row, peaks)
        best = key_float(top)
        total, place = np.int64(0), i32(1)
        for i in range(len(row)):  # in integers (2**40 = 1) the sum does not depend on its order, so it can be vectorised
            total += np.int64(exp_neg(f32(row[i] - best)) * f32(1 << 40))
        for i in range(len(row)):
            place = i32(place + (i32(1) if row[i] > mine else i32(0)))
        for i in range(ids[r]):
            place = i32(place + (i32(1) if row[i] == mine else i32(0)))
        norm[r] = best + np.log(np.float64(total)) - 40 * np.log(2.0)
        rank[r] = place


def token_logprobs(logits: Singles, ids: Ints, k: int) -> list[TokenLogprobs]:
    """One entry per row of ``logits`` float32 [n, V] for its id in ``ids`` [n], with the ``k`` most likely ids, ties to the lower id.

    Log-probabilities are natural logarithms of the softmax of the logits as given.
    """
    x, n = np.ascontiguousarray(logits, np.float32), len(ids)
    norm, rank = np.empty(n), np.empty(n, np.int64)
    _norm_and_rank(x, np.ascontiguousarray(ids, np.int32), norm, rank)
    tops = _most_likely(x, min(k, x.shape[1]))
    out = []
    for r, token in enumerate(ids.tolist()):
        best = tops[r]
        out.append(TokenLogprobs(token, float(x[r, token] - norm[r]), int(rank[r]), best.tolist(), (x[r, best] - norm[r]).tolist()))
    return out


def _most_likely(x: Singles, k: int) -> list[np.ndarray]:
    """Ids of the k largest entries of each row, largest first."""
    if k == 0:
        return [np.empty(0, np.int64)] * len(x)
    z = x.copy()
    if k < x.shape[1]:
        top_k_rows(z, np.arange(len(x)), np.full(len(x), k))
    out = []
    for row in z:
        kept = np.flatnonzero(row > -np.inf)
        out.append(kept[np.argsort(-row[kept], kind="stable")])
    return out
