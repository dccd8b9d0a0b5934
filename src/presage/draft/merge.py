"""SpecInfer's merge (Miao et al., ASPLOS 2024): the drafts of several drafters over the same grants as one token tree, the union of paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from presage.core.plan import Draft
from presage.core.types import Ints
from presage.draft.prune import keep_nodes


@njit("i8(i4[:,::1],i4[::1],i4[::1],f4[::1],u1[::1],i4[::1],i4[::1],i4[::1],i4[::1],f4[::1],u1[::1],i4[::1])", cache=True, nogil=True)
def _union(
    offset: Any, token: Any, parent: Any, prob: Any, source: Any, out_offset: Any, out_token: Any, out_parent: Any, out_depth: Any, out_prob: Any,
    out_source: Any, place: Any,
) -> int:  # fmt: skip
    """Merge by (parent, token). ``offset`` [D, G+1] into the drafts laid end to end; ``place``: merged node of each, flat.

    Siblings hang on lists, so a node costs as much as its parent has children.
    """
    child, after, n = np.full(len(token), -1, np.int32), np.full(len(token), -1, np.int32), 0
    out_offset[0] = 0
    for g in range(offset.shape[1] - 1):
        first, top = n, np.int64(-1)
        for d in range(offset.shape[0]):
            base = offset[d, g]
            for i in range(base, offset[d, g + 1]):
                up = np.int64(place[base + parent[i]]) if parent[i] >= 0 else np.int64(-1)
                k = np.int64(child[up]) if up >= 0 else top
                while k >= 0 and out_token[k] != token[i]:
                    k = np.int64(after[k])
                if k < 0:
                    k, n = np.int64(n), n + 1
                    after[k] = child[up] if up >= 0 else top
                    if up >= 0:
                        child[up] = k
                    else:
                        top = k
                    out_token[k], out_parent[k] = token[i], up - first if up >= 0 else -1
                    out_depth[k] = out_depth[up] + 1 if up >= 0 else 1
                    out_prob[k], out_source[k] = prob[i], source[i]
                elif prob[i] > out_prob[k]:
                    out_prob[k], out_source[k] = prob[i], source[i]
                place[i] = k
        out_offset[g + 1] = n
    return n


@njit("void(i4[::1],i4[::1],f4[::1],i4[::1],b1[::1],b1[::1])", cache=True, nogil=True)
def _strongest(offset: Any, parent: Any, prob: Any, budget: Any, held: Any, keep: Any) -> None:
    """Mark held nodes with their ancestors, then the likeliest others, at most ``budget`` [G] in all.

    A node is never likelier than its parent and comes after it, so a stable order by probability keeps prefixes closed.
    """
    for g in range(len(budget)):
        a, b = offset[g], offset[g + 1]
        for i in range(b - 1, a - 1, -1):
            if held[i]:
                keep[i] = True
                if parent[i] >= 0:
                    held[a + parent[i]] = True
        left = budget[g] - keep[a:b].sum()
        for i in np.argsort(-prob[a:b], kind="mergesort"):
            if left > 0 and not keep[a + i]:
                keep[a + i] = True
                left -= 1


def merge(drafts: Sequence[Draft], budget: Ints | None = None) -> Draft:
    """One draft per grant out of several over the same grants; parents first, each (parent, token) once.

    A node keeps the highest probability and the source that gave it. If some proposal was sampled (``trial_q`` >= 0), every proposal
    stays as a trial: first the sampled ones, drafter by drafter in their draw order, then the point masses. ``budget`` [G]: most nodes of
    a grant; point masses are dropped, least likely first. Sampled nodes are never dropped for what was drawn (that would bias
    rejection-type rules), so their drafters must fit the budget together.
    """
    lone = [d for d in drafts if len(d)]
    if len(lone) <= 1:
        one = lone[0] if lone else drafts[0]
        return one if budget is None else _cut(one, budget)
    shift = np.cumsum([0] + [len(d) for d in lone])
    offset = np.stack([d.offset + at for d, at in zip(lone, shift, strict=False)]).astype(np.int32)
    token, parent, prob = (np.concatenate([getattr(d, name) for d in lone]) for name in ("token", "parent", "prob"))
    source = np.concatenate([d.source if len(d.source) else np.zeros(len(d), np.uint8) for d in lone])
    total = len(token)
    ends, place = np.empty(offset.shape[1], np.int32), np.empty(total, np.int32)
    ints = [np.empty(total, np.int32) for _ in range(3)]
    out = Draft(ends, ints[0], ints[1], ints[2], np.empty(total, np.float32), np.empty(total, np.uint8))
    n = _union(offset, token, parent, prob, source, ends, out.token, out.parent, out.depth, out.prob, out.source, place)
    merged = Draft(ends, out.token[:n], out.parent[:n], out.depth[:n], out.prob[:n], out.source[:n])
    if any(d.q is not None for d in lone):
        _trials(lone, shift, place, merged)
    return merged if budget is None else _cut(merged, budget)


def _trials(drafts: Sequence[Draft], shift: np.ndarray, place: Ints, merged: Draft) -> None:
    """Proposals of all drafts on the merged nodes; rows of ``q`` are stacked."""
    nodes, rows, qs, base = [], [], [], 0
    for d, at in zip(drafts, shift, strict=False):
        node = d.trial_node if len(d.trial_node) else np.arange(len(d), dtype=np.int32)
        row = d.trial_q if len(d.trial_q) else np.full(len(node), -1, np.int32)
        nodes.append(place[node + at])
        rows.append(np.where(row < 0, -1, row + base))
        if d.q is not None:
            qs.append(np.asarray(d.q))
            base += len(d.q)
    row = np.concatenate(rows)
    # A point mass may hang on what was sampled, never the other way round: so sampled proposals are judged first.
    order = np.argsort(row < 0, kind="stable")
    merged.trial_node, merged.trial_q = np.concatenate(nodes)[order].astype(np.int32), row[order].astype(np.int32)
    merged.q = np.concatenate(qs)


def _cut(draft: Draft, budget: Ints) -> Draft:
    if (np.diff(draft.offset) <= budget).all():
        return draft
    held, keep = np.zeros(len(draft), np.bool_), np.zeros(len(draft), np.bool_)
    held[draft.trial_node[draft.trial_q >= 0]] = True
    _strongest(draft.offset, draft.parent, draft.prob, budget.astype(np.int32), held, keep)
    return keep_nodes(draft, keep, np.ones(len(budget), np.bool_))
