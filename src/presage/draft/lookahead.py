"""Lookahead (Zhao et al., "Lookahead: An Inference Acceleration Framework ...", KDD 2024): many short branches out of a trie, verified at once.

Outputs of all requests share one trie per (model, adapter, tenant, salt); a request's prompt has one of its own, freed with it. A draft is
the strongest part of both below the longest match of the last ids: prompt evidence ranks first, outputs keep half of the room.

Two deliberate differences to the paper. Reserved room really works (the official code never fills the set of reserved nodes). Where a long
match offers too few branches, a shorter one adds to them instead of replacing them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.core.errors import ConfigError
from presage.core.plan import Draft, NewIds
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Ints
from presage.draft.host import HostDrafter
from presage.draft.lookahead_trie import CHILD, FREQ, NEXT, TOKEN, Trie, find, prune_root, put
from presage.draft.sources import sources

_HEAP = 1 << 14  # candidates looked at per draft; more than this many siblings are never worth ranking
_OUTPUT = np.float32(1e-4)  # the paper's weight of output frequencies: they break ties between prompt frequencies


@njit(inline="always")
def _above(q: Any, i: Any, j: Any) -> bool:
    """Whether candidate i outranks j: higher score, then seen first."""
    return q[0][i] > q[0][j] or (q[0][i] == q[0][j] and i < j)


@njit(cache=True, nogil=True)
def _push(q: Any, size: Any, score: Any, own: Any, shared: Any, up: Any) -> None:
    """Add a candidate to the heap. ``q``: score, own node, shared node, parent in the draft, heap order; ``size``: [candidates, heap]."""
    i, at, heap = size[0], size[1], q[4]
    if i == len(heap):
        return
    q[0][i], q[1][i], q[2][i], q[3][i] = score, own, shared, up
    size[0], size[1] = i + 1, at + 1
    while at > 0 and _above(q, i, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = i


@njit(cache=True, nogil=True)
def _pop(q: Any, size: Any) -> Any:
    """Take the best candidate out of the heap."""
    heap = q[4]
    best, size[1] = np.int64(heap[0]), size[1] - 1
    n, last, at = size[1], heap[size[1]], 0
    while 2 * at + 1 < n:
        below = 2 * at + 1
        if below + 1 < n and _above(q, heap[below + 1], heap[below]):
            below += 1
        if not _above(q, heap[below], last):
            break
        heap[at] = heap[below]
        at = below
    heap[at] = last
    return best


@njit(cache=True, nogil=True)
def _offer(t: Any, q: Any, size: Any, own: Any, shared: Any, up: Any, outputs: bool) -> None:
    """Push the children of a pair of nodes (-1: not in that trie), ranked by outputs alone or by prompt first."""
    freq, weight = t[FREQ], _OUTPUT
    if own >= 0 and not outputs:
        c = np.int64(t[CHILD][own])
        while c >= 0:
            twin = find(t, shared, t[TOKEN][c]) if shared >= 0 else np.int64(-1)
            score = freq[c] * (np.float32(1) - weight) + (freq[twin] * weight if twin >= 0 else np.float32(0))
            _push(q, size, score, c, twin, up)
            c = np.int64(t[NEXT][c])
    if shared >= 0:
        c = np.int64(t[CHILD][shared])
        while c >= 0:
            twin = find(t, own, t[TOKEN][c]) if own >= 0 else np.int64(-1)
            if outputs or twin < 0:
                _push(q, size, freq[c] if outputs else freq[c] * weight, twin, c, up)
            c = np.int64(t[NEXT][c])


@njit(inline="always")
def _count(t: Any, own: Any, shared: Any) -> Any:
    return (t[FREQ][own] if own >= 0 else np.float32(0)) + (t[FREQ][shared] if shared >= 0 else np.float32(0))


@njit(cache=True, nogil=True)
def _take(t: Any, q: Any, size: Any, own: Any, shared: Any, out: Any, first: Any, n: Any, limit: Any, branch: Any, outputs: bool, chain: bool) -> Any:
    """Best-first below a match until the grant has ``limit`` nodes; returns how many it has. ``out``: token, parent, depth, prob.

    Frequencies never rise down a path, so taking the strongest candidate first gives a prefix-closed set.
    """
    token, parent, depth, prob = out
    # One more than was counted: a continuation seen once is an even bet, not a certainty.
    matched = _count(t, own, shared) + np.float32(1)
    size[0] = size[1] = 0
    _offer(t, q, size, own, shared, -1, outputs)
    while n < limit and size[1] > 0:
        i = _pop(q, size)
        a, b, up = np.int64(q[1][i]), np.int64(q[2][i]), np.int64(q[3][i])
        tok, k = t[TOKEN][a if a >= 0 else b], up + 1
        while k < n and (parent[first + k] != up or token[first + k] != tok):
            k += 1
        if k == n:
            sure = _count(t, a, b) / matched
            token[first + k], parent[first + k] = tok, up
            depth[first + k] = depth[first + up] + 1 if up >= 0 else 1
            prob[first + k] = min(sure, prob[first + up]) if up >= 0 else sure
            n += 1
        if chain:
            size[0] = size[1] = 0
        if depth[first + k] < branch:
            _offer(t, q, size, a, b, k, outputs)
    return n


@njit(cache=True, nogil=True)
def _retrieve(
    t: Any, data: Any, start: Any, length: Any, own: Any, shared: Any, slots: Any, budget: Any, query: Any, branch: Any, chain: bool, q: Any,
    offset: Any, out: Any,
) -> None:  # fmt: skip
    """Drafts of all slots: for each, the longest query first, then shorter ones while there are fewer nodes than one branch holds."""
    size, at = np.zeros(2, np.int64), 0
    for i in range(len(slots)):
        s, n, k = slots[i], 0, min(query, length[slots[i]])
        enough = min(branch, budget[i])
        while k > 0 and n < enough and not (chain and n > 0):
            a, b = np.int64(own[s]), np.int64(shared[s])
            for j in range(length[s] - k, length[s]):
                tok = data[start[s] + j]
                a = find(t, a, tok) if a >= 0 else a
                b = find(t, b, tok) if b >= 0 else b
            if b >= 0 and a >= 0 and not chain:
                n = _take(t, q, size, a, b, out, at, n, min(budget[i], n + budget[i] // 2), branch, True, chain)
            if a >= 0 or b >= 0:
                n = _take(t, q, size, a, b, out, at, n, budget[i], branch, False, chain)
            k -= 1
        at += n
        offset[i + 1] = at


@njit(cache=True, nogil=True)
def _insert(
    t: Any, data: Any, start: Any, prompt: Any, done: Any, skip: Any, own: Any, shared: Any, slots: Any, upto: Any, branch: Any,
    max_node: Any, max_output_node: Any,
) -> None:  # fmt: skip
    """Windows that start in [done, upto): those of the prompt at once, those of the output when all their ids are there."""
    for i in range(len(slots)):
        s, a = slots[i], np.int64(done[slots[i]])
        ids = data[start[s] :]
        b = min(upto[i], prompt[s])
        if a < b:
            put(t, own[s], ids, a, b, prompt[s], branch, max_node)
            a = np.int64(b)
        if a >= prompt[s]:
            a = max(a, np.int64(skip[s]))
            put(t, shared[s], ids, a, upto[i] - branch, upto[i], branch, max_output_node)
            a = max(a, np.int64(upto[i] - branch))
        done[s] = a


class LookaheadDrafter(HostDrafter):
    """Multi-branch retrieval; trees, or with ``tree=False`` the strongest single branch.

    ``decoding_length``: draft nodes of a step over the whole batch; ``branch_length``: longest branch; ``query_length``: ids matched;
    ``max_node``, ``max_output_node``: nodes per first token of prompts and of outputs before pruning; ``max_nodes``: of everything.
    ``num_speculative_tokens``: most nodes of one request, by default all of them. Raises ConfigError for settings below 1.
    """

    source = "lookahead"
    quota = 1024

    def __init__(
        self,
        num_speculative_tokens: int | None = None,
        decoding_length: int = 64,
        branch_length: int = 12,
        query_length: int = 2,
        tree: bool = True,
        max_node: int = 65536,
        max_output_node: int = 1024,
        max_nodes: int = 1 << 22,
    ) -> None:
        super().__init__(decoding_length if num_speculative_tokens is None else num_speculative_tokens)
        for name, value in (("decoding_length", decoding_length), ("branch_length", branch_length), ("query_length", query_length)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", param=name)
        self.decoding_length, self.branch_length, self.query_length, self.tree = decoding_length, branch_length, query_length, tree
        self.lag = branch_length
        self.max_node, self.max_output_node, self.max_nodes = max_node, max_output_node, max_nodes
        self.trie = Trie()
        self.trie.root()  # node 0 is nobody's, so that zeroed columns mean "none"
        self.spaces: dict[tuple[str, str | None, str, bytes], int] = {}
        self._doomed: list[int] = []
        self.own, self.shared, self.skip = (np.zeros(8, np.int32) for _ in range(3))
        self._heap = (np.empty(_HEAP, np.float32), *(np.empty(_HEAP, np.int32) for _ in range(4)))

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot."""
        super().open(slot, req)
        key = (req.model, req.adapter, req.tenant, req.salt)
        if key not in self.spaces:
            self.spaces[key] = self.trie.root()
        self.own[slot], self.shared[slot], self.skip[slot] = self.trie.root(), self.spaces[key], 0

    def advance(self, new: NewIds) -> None:
        """Committed ids of one step; tries of closed prompts are freed by quota too."""
        super().advance(new)
        if self._doomed:
            self.sweep(self.quota * self.branch_length)

    def sweep(self, nodes: int) -> None:
        """Free up to ``nodes`` nodes that closed requests left behind."""
        while self._doomed and nodes > 0:
            freed = self.trie.free(self._doomed[-1], nodes)
            if freed > 0:
                self._doomed.pop()
            nodes -= abs(freed)

    def fork(self, src: int, dst: int, req: Request) -> None:
        """As the base; outputs that ``src`` put into the shared trie are not counted twice."""
        super().fork(src, dst, req)
        self.skip[dst] = self.done[src]

    def hint(self, view: EngineView) -> Ints:
        """As the base, within an equal share of ``decoding_length``."""
        return np.minimum(super().hint(view), max(1, self.decoding_length // max(1, len(view.ready))))

    def draft(self, slots: Ints, budget: Ints) -> Draft:
        """Trees or chains of at most ``budget`` [G] nodes, ``branch_length`` deep; ``prob`` = count / (count of the match + 1)."""
        total, offset = int(budget.sum()), np.zeros(len(slots) + 1, np.int32)
        token, parent, depth = (np.empty(total, np.int32) for _ in range(3))
        prob = np.empty(total, np.float32)
        _retrieve(
            self.trie.arrays, self.tokens.data, self.start, self.length, self.own, self.shared, slots, budget, self.query_length,
            self.branch_length, not self.tree, self._heap, offset, (token, parent, depth, prob),
        )  # fmt: skip
        n = int(offset[-1])
        return Draft(offset, token[:n], parent[:n], depth[:n], prob[:n], sources(n, self.source))

    def _index(self, slots: Ints, upto: Ints) -> None:
        starts = int(np.maximum(upto - self.done[slots], 0).sum())
        self.trie.reserve(starts * (self.branch_length + 1))
        _insert(
            self.trie.arrays, self.tokens.data, self.start, self.prompt, self.done, self.skip, self.own, self.shared, slots, upto,
            self.branch_length, self.max_node, self.max_output_node,
        )  # fmt: skip
        while self.trie.nodes > self.max_nodes and self._prune():
            continue

    def _prune(self) -> int:
        """Free what is closed, else halve all outputs, and prompts too if that frees nothing; returns how many nodes were freed."""
        before = self.trie.nodes
        self.sweep(before)
        freed = before - self.trie.nodes or sum(int(prune_root(self.trie.arrays, root)) for root in self.spaces.values())
        return freed or sum(int(prune_root(self.trie.arrays, root)) for root in self.own[self.own > 0].tolist())

    def _forget(self, slot: int, known: int) -> None:
        if known < self.prompt[slot] or known == 0:
            self._doomed.append(int(self.own[slot]))
            self.own[slot] = self.trie.root()
            self.prompt[slot], self.done[slot] = min(int(self.prompt[slot]), known) if known else self.prompt[slot], 0
        else:
            # What was generated stays as evidence in the shared trie; only later ids are put in anew.
            self.done[slot] = min(int(self.done[slot]), known)
        self.skip[slot] = min(int(self.skip[slot]), known)

    def _drop(self, slot: int) -> None:
        """The last windows of the output go in, cut short; the prompt's trie is left to ``sweep``."""
        if not self.own[slot]:
            return
        a, n, first = int(self.done[slot]), int(self.length[slot]), int(self.start[slot])
        if self.prompt[slot] <= a < n and self.cap[slot]:
            self.trie.reserve((n - a) * (self.branch_length + 1))
            put(
                self.trie.arrays, int(self.shared[slot]), self.tokens.data[first : first + n], a, n, n, self.branch_length, self.max_output_node
            )  # fmt: skip
        self._doomed.append(int(self.own[slot]))
        self.own[slot] = self.shared[slot] = self.skip[slot] = 0
