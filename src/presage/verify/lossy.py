"""The walk of rules that keep drafts which the target did not draw: the longest branch such a rule keeps, then draws as ``keyed`` does.

Where a rule keeps nothing, tokens and paths are exactly those of ``keyed``: that is every lossy rule's identity point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from presage.core.plan import Draft, Verdict
from presage.core.types import Floats, Ints
from presage.verify.walk import follow, verdict_of

# (span, node, flat indices of its children) -> log-likelihood [n] of the children to keep, -inf for the others
Keeps = Callable[[int, int, Ints], Floats]


def lossy_walk(rows: Any, draft: Draft, noise: Any, keeps: Keeps) -> Verdict:
    """Per span: follow the longest kept branch (ties: the likelier, then the first), draw at its end, go on while a child holds the draw."""
    children = _children(draft)
    ids, paths = dict[int, list[int]](), dict[int, list[int]]()
    for s in rows.spans.tolist():
        ids[s], paths[s] = [], []
        node: int | None = -1
        while node is not None:
            best = _longest(rows, draft, s, node, children, keeps)
            ids[s] += [int(draft.token[draft.offset[s] + i]) for i in best]
            paths[s] += best
            token, node = _draw(rows, draft, noise, s, best[-1] if best else node)
            ids[s].append(token)
            if node is not None:
                paths[s].append(node)
    for s in rows.failed:
        ids.pop(s, None)
        paths.pop(s, None)
    return verdict_of(len(rows.slot), paths, ids)


def _draw(rows: Any, draft: Draft, noise: Any, span: int, node: int) -> tuple[int, int | None]:
    """The target's own token after ``node``, and the child that holds it or None."""
    spans, nodes = np.array([span], np.int32), np.array([node], np.int32)
    token = rows.draw(spans, nodes, noise)
    child = int(follow(draft, spans, nodes, token)[0]) if len(draft) and span not in rows.failed else -1
    return int(token[0]), child if child >= 0 else None


def _longest(rows: Any, draft: Draft, span: int, top: int, children: dict[tuple[int, int], Ints], keeps: Keeps) -> list[int]:
    """Nodes of the longest kept branch below ``top``."""
    best, found, open_ = 0.0, list[int](), [(top, 0.0, list[int]())]
    for node, score, path in open_:  # grows while it is read: breadth first, only below what is kept
        below = children.get((span, node))
        if below is None or span in rows.failed:
            continue
        for i, log_p in zip((below - draft.offset[span]).tolist(), keeps(span, node, below).tolist(), strict=True):
            if log_p == -np.inf:
                continue
            branch = [*path, i]
            open_.append((i, score + log_p, branch))
            if len(branch) > len(found) or (len(branch) == len(found) and score + log_p > best):
                best, found = score + log_p, branch
    return found


def _children(draft: Draft) -> dict[tuple[int, int], Ints]:
    """(span, node) -> flat indices of its children."""
    out: dict[tuple[int, int], list[int]] = {}
    spans = np.repeat(np.arange(len(draft.offset) - 1), np.diff(draft.offset)).tolist()
    for i, (s, parent) in enumerate(zip(spans, draft.parent.tolist(), strict=True)):
        out.setdefault((s, parent), []).append(i)
    return {key: np.array(v, np.int32) for key, v in out.items()}
