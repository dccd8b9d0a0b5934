"""Token trees of a batch while their drafter computes them level by level: which nodes to expand, and which to propose in the end.

A chain is a tree of width 1. Best first, in the manner of EAGLE-2 (Li et al., 2024): of each level the likeliest paths are expanded, and the
likeliest nodes of all, expanded or not, are proposed. Draws are not ranked: a draw may be dropped only for reasons fixed before it was made.
"""

from __future__ import annotations

import numpy as np

from presage.core.plan import Draft
from presage.core.types import Ints, Singles, Words
from presage.draft.sources import sources
from presage.execute.propose import Ask, Proposed


class Trees:
    """Nodes of ``budget`` [G] trees, flat in the order in which they were proposed. ``limit`` [G]: deepest level. ``ask``: children of a node
    and how they are chosen; ``min_prob``: paths less likely than this are not expanded.

    ``front``: nodes whose children the next pass proposes, grant by grant (-1: the root); ``owner_of_front``: their grants.
    ``place``: a computed node's place behind the known tokens, -1 where its row was not computed. ``bits`` [N, W]: ancestors by place.
    """

    def __init__(self, budget: Ints, limit: Ints, ask: Ask, min_prob: float = 0.0) -> None:
        self.budget, self.limit, self.ask, self.min_prob = budget, limit, ask, min_prob
        self.owner, self.token, self.parent, self.depth, self.place = (np.empty(0, np.int32) for _ in range(5))
        self.prob: Singles = np.empty(0, np.float32)
        self.computed = np.zeros(len(budget), np.int32)
        self.proposed = np.zeros(len(budget), np.int32)
        self.bits: Words = np.empty((0, max(1, -(-int(budget.max(initial=0)) // 64))), np.uint64)
        self.owner_of_front = np.flatnonzero((budget > 0) & (limit > 0)).astype(np.int32)
        self.front = np.full(len(self.owner_of_front), -1, np.int32)
        self._children = np.minimum(budget, ask.width)
        self._trials: tuple[list[int], list[int]] = [], []
        self._q: list[Singles] = []

    def grow(self, got: Proposed, alive: np.ndarray) -> None:
        """Take in what a pass proposed after each node of ``front``; grants not ``alive`` [G] get no more."""
        rows, columns = self._draws(got) if self.ask.draws else np.nonzero(got.ids >= 0)
        at, up = self.owner_of_front[rows], self.front[rows]
        base = np.where(up >= 0, self.prob[up], 1.0) if len(self.prob) else np.ones(len(up))
        prob = np.minimum(np.maximum(base * got.prob[rows, columns], 1e-30), base).astype(np.float32)
        level = np.where(up >= 0, self.depth[up], 0) + 1 if len(self.depth) else np.ones(len(up))
        first = len(self.token)
        self.owner, self.token = _more(self.owner, at), _more(self.token, got.ids[rows, columns])
        self.parent, self.depth = _more(self.parent, up), _more(self.depth, level)
        self.place, self.prob = _more(self.place, np.full(len(at), -1)), np.concatenate([self.prob, prob])
        self.bits = np.concatenate([self.bits, np.zeros((len(at), self.bits.shape[1]), np.uint64)])
        self.proposed += np.bincount(at, minlength=len(self.budget)).astype(np.int32)
        self._advance(first, alive)

    def _advance(self, first: int, alive: np.ndarray) -> None:
        """Choose the nodes to expand among those from ``first`` on, and give each its place."""
        node = np.arange(first, len(self.token), dtype=np.int32)
        owner = self.owner[node]
        able = alive[owner] & (self.depth[node] < self.limit[owner]) & (self.prob[node] >= self.min_prob)
        node = node[able]
        node = node[np.lexsort((node, -self.prob[node], self.owner[node]))]
        owner = self.owner[node]
        rank = _rank(owner)
        room = np.minimum(self.ask.width, self.budget - self.computed)
        if self.ask.draws:
            # How many children a level may have is settled before they are drawn.
            left = self.budget - self.proposed
            room = np.minimum(room, left)
            self._children = np.minimum(self.ask.width, left // np.maximum(np.minimum(np.bincount(owner, minlength=len(room)), room), 1))
        keep = rank < room[owner]
        self.front, self.owner_of_front = node[keep], owner[keep]
        place = self.computed[self.owner_of_front] + rank[keep]
        self.place[self.front] = place
        up = self.parent[self.front]
        self.bits[self.front] = np.where(up[:, None] >= 0, self.bits[up], np.uint64(0))
        self.bits[self.front, place // 64] |= np.left_shift(np.uint64(1), (place % 64).astype(np.uint64))
        self.computed += np.bincount(self.owner_of_front, minlength=len(self.budget)).astype(np.int32)

    def _draws(self, got: Proposed) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of the draws that make a new node. Each draw is a trial; draws of one token after one node share it."""
        rows, columns, base = list[int](), list[int](), sum(len(q) for q in self._q)
        for r, owner in enumerate(self.owner_of_front.tolist()):
            seen: dict[int, int] = {}
            for c in range(int(self._children[owner])):
                token = int(got.ids[r, c])
                if token < 0:
                    continue
                if token not in seen:
                    seen[token] = len(self.token) + len(rows)
                    rows.append(r)
                    columns.append(c)
                self._trials[0].append(seen[token])
                self._trials[1].append(base + r)
        if got.q is not None:
            self._q.append(got.q)
        return np.array(rows, np.int64), np.array(columns, np.int64)

    def kept(self) -> Ints:
        """Nodes whose rows lie in the lane's cache where the same tokens' rows will be if they are accepted: chains from the root."""
        chain = np.zeros(len(self.token), np.bool_)
        for i in np.flatnonzero((self.place >= 0) & (self.place == self.depth - 1)).tolist():
            chain[i] = self.parent[i] < 0 or chain[self.parent[i]]
        return np.flatnonzero(chain).astype(np.int32)

    def computed_draft(self) -> tuple[Ints, Draft]:
        """The computed nodes by grant and place, as a draft over the grants of ``front`` (and these grants)."""
        owners = np.unique(self.owner_of_front).astype(np.int32)
        node = np.flatnonzero((self.place >= 0) & np.isin(self.owner, owners))
        node = node[np.lexsort((self.place[node], self.owner[node]))]
        offset = np.concatenate([[0], np.cumsum(self.computed[owners])]).astype(np.int32)
        up = self.parent[node]
        parent = np.where(up >= 0, self.place[up], -1).astype(np.int32)
        return owners, Draft(offset, self.token[node], parent, self.depth[node], self.prob[node])

    def draft(self, source: str) -> Draft:
        """The likeliest nodes of each grant, at most ``budget`` of them; all of them where they were drawn."""
        node = np.lexsort((np.arange(len(self.token)), -self.prob, self.owner))
        node = node[_rank(self.owner[node]) < self.budget[self.owner[node]]] if not self.ask.draws else node
        node = node[np.lexsort((node, self.owner[node]))]
        counts = np.bincount(self.owner[node], minlength=len(self.budget))
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        where = np.full(len(self.token) + 1, -1, np.int32)
        where[node] = np.arange(len(node)) - offset[self.owner[node]]
        out = Draft(
            offset, self.token[node], where[self.parent[node]], self.depth[node], self.prob[node], sources(len(node), source)
        )  # fmt: skip
        if self.ask.draws and len(node):
            flat = where[:-1] + offset[self.owner]
            out.trial_node, out.trial_q = flat[self._trials[0]].astype(np.int32), np.array(self._trials[1], np.int32)
            out.q = np.concatenate(self._q)
        return out


def _more(a: Ints, b: np.ndarray) -> Ints:
    return np.concatenate([a, b.astype(np.int32)])


def _rank(owner: Ints) -> Ints:
    """Place of each entry within its run of equal owners."""
    at = np.arange(len(owner))
    new = np.concatenate([[True], owner[1:] != owner[:-1]])[: len(owner)]
    return (at - np.maximum.accumulate(np.where(new, at, 0))).astype(np.int32) if len(owner) else owner
