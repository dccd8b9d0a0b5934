"""One depth for a whole batch: tokens and seconds of the step if every draft is cut below depth k, for every k at once."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import njit

from presage.core.protocols import LatencyModel
from presage.core.types import Floats, Ints
from presage.draft.length.scan import FEATURES, Batch, step_features


@njit(cache=True, nogil=True)
def _levels(offset, depth, at, path, start, tokens, samples, share, cap, features, value):
    """Row k: drafts cut below depth k. ``path[at[g] + d - 1]``: probability that span g gets d drafts accepted."""
    top = len(value) - 1
    value[:] = 0.0
    for g in range(len(start)):
        for n in range(offset[g], min(offset[g + 1], offset[g] + cap[g])):
            features[depth[n], 0] += 1.0
        for d in range(at[g + 1] - at[g]):
            value[d + 1] += path[at[g] + d]
    nodes = 0.0
    base = np.empty(FEATURES)
    value[0] = step_features(start, tokens, samples, share, base)
    context = base[6] / max(len(start), 1)
    for k in range(top + 1):
        nodes += features[k, 0]
        features[k] = base
        features[k, 0] += nodes
        features[k, 4] = nodes
        features[k, 5] += nodes
        features[k, 6] += nodes
        features[k, 7] += nodes * context
        if k > 0:
            value[k] += value[k - 1]


def level_curve(batch: Batch, offset: Ints, depth: Ints, at: Ints, path: Floats, latency: LatencyModel) -> tuple[Floats, Floats]:
    """(tokens [K + 1], seconds [K + 1]) of a step whose drafts are cut below depth 0..K, K being the deepest node.

    ``offset`` [G + 1] and ``depth`` [N] describe the nodes, ``at`` [G + 1] and ``path`` the chance of each span to reach each depth.
    """
    top = max(int(depth.max()) if len(depth) else 0, int(np.diff(at).max()) if len(at) > 1 else 0)
    features, value = np.zeros((top + 1, FEATURES)), np.empty(top + 1)
    _levels(offset, depth, at, path, batch.start, batch.tokens, batch.samples, batch.share, batch.cap, features, value)
    return value, np.asarray(latency.predict(features)[:, 0])


def chain_depths(length: Ints) -> tuple[Ints, Ints]:
    """(offset [n + 1], depth [N]) of chains of ``length`` [n]."""
    offset = np.zeros(len(length) + 1, np.int32)
    np.cumsum(length, out=offset[1:])
    depth = np.arange(1, int(offset[-1]) + 1, dtype=np.int32) - np.repeat(offset[:-1], length)
    return offset, depth.astype(np.int32)


def best_level(tokens: Floats, seconds: Floats, extra: Floats | float) -> int:
    """The depth with most tokens per second; every depth is looked at, and of equals the least is taken."""
    return int(np.argmax(tokens / np.maximum(seconds + extra, 1e-9)))
