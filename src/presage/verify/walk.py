"""Follow the draft as long as it holds the token that was drawn: one round per depth, all spans at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.core.plan import Draft, Verdict
from presage.core.types import Ints


@njit("void(i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1])", cache=True, nogil=True)
def _follow(offset: Any, token: Any, parent: Any, spans: Any, nodes: Any, ids: Any, out: Any) -> None:
    """The child of each (span, node) that holds its id, or -1. Children come after their parent."""
    for j in range(len(spans)):
        out[j] = -1
        first = offset[spans[j]]
        for i in range(nodes[j] + 1, offset[spans[j] + 1] - first):
            if parent[first + i] == nodes[j] and token[first + i] == ids[j]:
                out[j] = i
                break


def follow(draft: Draft, spans: Ints, nodes: Ints, ids: Ints) -> Ints:
    """Child [n] of each (span, node) whose token is the id, -1 where there is none."""
    out = np.empty(len(spans), np.int32)
    _follow(draft.offset, draft.token, draft.parent, spans, nodes, ids, out)
    return out


def ends(rows: Any, span: int, node: int) -> bool:
    """Whether a grammar lets nothing follow the node: the request ends there, as in a run without drafts, and no id may be drawn after it."""
    late = rows.plan.late
    return late is not None and late.ends(span, node)


def verdict_of(spans: int, paths: dict[int, list[int]], ids: dict[int, list[int]]) -> Verdict:
    """Flat arrays from per-span lists; absent spans decide nothing."""
    path_off, off = np.zeros(spans + 1, np.int32), np.zeros(spans + 1, np.int32)
    for s in ids:
        path_off[s + 1], off[s + 1] = len(paths[s]), len(ids[s])
    flat_path = [node for s in sorted(paths) for node in paths[s]]
    flat_ids = [token for s in sorted(ids) for token in ids[s]]
    return Verdict(
        np.cumsum(path_off, dtype=np.int32), np.array(flat_path, np.int32), np.cumsum(off, dtype=np.int32), np.array(flat_ids, np.int32)
    )


def walk(rows: Any, draft: Draft, noise: Any) -> Verdict:
    """Draw at the last known token; while a child holds the draw, accept it and draw at its row. The last draw is bonus or correction."""
    spans, total = rows.spans, len(rows.slot)
    nodes = np.full(len(spans), -1, np.int32)
    drawn = rows.draw(spans, nodes, noise)
    if not len(draft):
        return _without_drafts(total, spans, drawn)
    ids: dict[int, list[int]] = {s: [] for s in spans.tolist()}
    paths: dict[int, list[int]] = {s: [] for s in spans.tolist()}
    while True:
        for s, token in zip(spans.tolist(), drawn.tolist(), strict=True):
            ids[s].append(token)
        children = follow(draft, spans, nodes, drawn)
        on = np.flatnonzero((children >= 0) & (drawn >= 0))
        if not len(on):
            break
        spans, nodes = spans[on], children[on]
        for s, node in zip(spans.tolist(), nodes.tolist(), strict=True):
            paths[s].append(node)
        drawn = rows.draw(spans, nodes, noise)
    for s in rows.failed:
        del ids[s], paths[s]
    return verdict_of(total, paths, ids)


def _without_drafts(total: int, spans: Ints, drawn: Ints) -> Verdict:
    good = drawn >= 0
    counts = np.zeros(total + 1, np.int32)
    counts[spans[good] + 1] = 1
    return Verdict(np.zeros(total + 1, np.int32), np.empty(0, np.int32), np.cumsum(counts, dtype=np.int32), drawn[good])
