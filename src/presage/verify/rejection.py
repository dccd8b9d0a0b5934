"""Speculative sampling by rejection (Leviathan et al., ICML 2023; Chen et al., 2023), and its recursive form for several drafts per node.

Accept x with probability min(1, p(x) / q(x)); on rejection go on with the residual norm((p - q)+). A point mass is q = 1 at x: accept with
p(x), else take x out. Trials of one node are judged one after the other against the shrinking target (SpecInfer, ASPLOS 2024), which stays
exact as long as each was drawn on its own from its q. Exact in distribution, but which token a seed gives depends on what was drafted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from presage.core.plan import Draft, Verdict
from presage.core.types import Floats
from presage.execute.sampling.noise import RESIDUAL
from presage.verify.walk import ends, verdict_of

Trial = tuple[int, int, int]
"""(child node, token, row of q or -1)."""


def accept_probability(p: Floats, x: int, q: Floats | None) -> float:
    """Probability of keeping ``x`` [V target ``p``], drawn from ``q`` (None: a point mass)."""
    if q is None:
        return float(p[x])
    return float(min(1.0, p[x] / q[x])) if q[x] > 0 else 0.0


def residual(p: Floats, x: int, q: Floats | None) -> Floats:
    """The target that is left once ``x`` was rejected, normalised; ``p`` itself where rounding leaves nothing."""
    if q is None:
        left = p.copy()
        left[x] = 0.0
    else:
        left = np.maximum(p - q, 0.0)
    total = left.sum()
    return left / total if total > 0 else p


class Rejection:
    """Implements ``core.protocols.AcceptanceRule`` for chains and trees of point-mass or model drafts.

    ``draft.trial_node``: flat node index per proposal in draw order, ``trial_q``: its row of ``draft.q`` [rows, V] or -1. Without trials
    every node is one point-mass proposal.
    """

    lossless = True
    seed_stable = False

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict:
        """``rows``: execute.sampling.Rows, ``noise``: execute.sampling.Noise."""
        trials = _trials(draft)
        q = None if draft.q is None else np.asarray(draft.q, np.float64)
        ids, paths = dict[int, list[int]](), dict[int, list[int]]()
        for s in rows.spans.tolist():
            ids[s], paths[s] = self._tree(rows, noise, s, trials, q)
        for s in rows.failed:
            del ids[s], paths[s]
        return verdict_of(len(rows.slot), paths, ids)

    def _tree(self, rows: Any, noise: Any, span: int, trials: dict[tuple[int, int], list[Trial]], q: Floats | None) -> tuple[list[int], list[int]]:
        """Ids and accepted nodes of one span, node by node."""
        ids, path, node = list[int](), list[int](), -1
        while node < 0 or not ends(rows, span, node):
            token, child = self._decide(rows, noise, span, node, trials.get((span, node), []), q)
            ids.append(token)
            if child is None:
                break
            path.append(child)
            node = child
        return ids, path

    def _decide(
        self, rows: Any, noise: Any, span: int, node: int, trials: list[Trial], q: Floats | None
    ) -> tuple[int, int | None]:
        """The token after ``node`` and the accepted child that holds it, None if it is a correction or a bonus."""
        here = np.array([span], np.int32), np.array([node], np.int32)
        if not trials:
            return int(rows.draw(*here, noise)[0]), None
        p = rows.probs(*here)[0]
        if span in rows.failed:
            return -1, None
        depth = int(rows.depth(*here)[0])
        for i, (child, token, proposal) in enumerate(self._proposals(trials, p, q)):
            if noise.uniform(span, depth, index=i) < accept_probability(p, token, proposal):
                return token, child
            p = residual(p, token, proposal)
        return noise.choose(p, span, depth, RESIDUAL), None

    def _proposals(self, trials: list[Trial], p: Floats, q: Floats | None) -> Iterator[tuple[int, int, Floats | None]]:
        """(child, token, what the token was drawn from or None for a point mass) of the trials that the target ``p`` allows.

        A grammar prunes sampled children for what they are, which would bias the ratio test. It stays exact because each proposal is taken as
        what it is then: a draw from q restricted to ids that the target allows, made or not by a coin that does not depend on it.
        """
        for child, token, row in trials:
            if p[token] > 0:
                yield child, token, None if row < 0 or q is None else allowed(q[row], p)


def allowed(q: Floats, p: Floats) -> Floats:
    """The proposal ``q`` [V] given that the target ``p`` [V] allows what was drawn; all 0 if it allows none."""
    some = np.where(p > 0, q, 0.0)
    total = float(some.sum())
    return some / total if total > 0 else some


def _trials(draft: Draft) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(span, parent) -> [(child, token, row of q)] in draw order."""
    flat = draft.trial_node if len(draft.trial_node) else np.arange(len(draft), dtype=np.int32)
    q = draft.trial_q if len(draft.trial_q) else np.full(len(flat), -1, np.int32)
    span = np.searchsorted(draft.offset, flat, side="right") - 1
    out: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for s, i, row in zip(span.tolist(), flat.tolist(), q.tolist(), strict=True):
        out.setdefault((s, int(draft.parent[i])), []).append((i - int(draft.offset[s]), int(draft.token[i]), row))
    return out
