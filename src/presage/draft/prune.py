"""Cut a batch of draft trees to a prefix-closed subset without losing their order."""

from __future__ import annotations

import numpy as np

from presage.core.plan import Draft


def keep_nodes(draft: Draft, node: np.ndarray, grant: np.ndarray) -> Draft:
    """The draft restricted to nodes where ``node`` [N] holds and to grants where ``grant`` [G] holds.

    A kept node whose parent is dropped goes too. Indices are renumbered within each grant; trials of dropped nodes go with them.
    """
    counts = np.diff(draft.offset)
    owner = np.repeat(np.arange(len(counts)), counts)
    keep = node & grant[owner] if len(owner) else node
    first = draft.offset[:-1]
    inner = np.flatnonzero(keep & (draft.parent >= 0))
    above = first[owner[inner]] + draft.parent[inner]
    # A round settles one level; cuts are nearly always prefix-closed already.
    while (lost := keep[inner] & ~keep[above]).any():
        keep[inner[lost]] = False
    place = np.cumsum(keep) - 1
    kept = np.bincount(owner[keep], minlength=len(counts)) if len(owner) else np.zeros(len(counts), np.int64)
    offset = np.concatenate([[0], np.cumsum(kept[grant])]).astype(np.int32)
    base = np.concatenate([[0], np.cumsum(kept)])[:-1]
    up = first[owner] + draft.parent if len(owner) else draft.parent
    parent = np.where(draft.parent >= 0, place[np.maximum(up, 0)] - base[owner], -1)[keep] if len(owner) else draft.parent
    trial = keep[draft.trial_node] if len(draft.trial_node) else np.zeros(0, bool)
    return Draft(
        offset,
        draft.token[keep],
        parent.astype(np.int32),
        draft.depth[keep],
        draft.prob[keep],
        draft.source[keep] if len(draft.source) else draft.source,
        place[draft.trial_node[trial]].astype(np.int32),
        draft.trial_q[trial] if len(draft.trial_q) else draft.trial_q,
        draft.q,
    )
