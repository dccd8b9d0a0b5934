"""A forest of token tries in flat arrays, for ``lookahead``: insert windows with frequencies, prune, free, and find children by hash.

A root stands for one owner (a shared pool of outputs, or one request's prompt). Below it hangs a tree per first token; a path spells the
ids that followed, ``freq`` counts how often. Every kernel takes the arrays as one tuple ``t`` (see ``Trie.arrays``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.core.types import Ints, Longs, Singles

# Columns of ``t``: the hash (key = node << 32 | token), links per node, frequency, nodes per tree, free list, [free nodes, nodes used]
KEYS, VALUES, TOKEN, PARENT, CHILD, NEXT, PREV, FREQ, SIZE, FREE, META = range(11)
ALL = 1 << 62

# Compiled for one signature each: callers mix widths of integers, and every mix would be compiled anew.
ARRAYS = f"Tuple((i8[::1],{6 * 'i4[::1],'}f4[::1],i4[::1],i4[::1],i8[::1]))"


@njit(inline="always")
def _slot_of(key: Any, mask: Any) -> Any:
    x = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((x ^ (x >> np.uint64(32))) & np.uint64(mask))


@njit(f"i8({ARRAYS},i8,i8)", cache=True, nogil=True)
def find(t: Any, node: Any, token: Any) -> Any:
    """The child of ``node`` that holds ``token``, -1 if there is none."""
    keys, mask = t[KEYS], len(t[KEYS]) - 1
    key = (np.int64(node) << 32) | np.int64(token)
    p = _slot_of(key, mask)
    while keys[p] >= 0:
        if keys[p] == key:
            return np.int64(t[VALUES][p])
        p = (p + 1) & mask
    return np.int64(-1)


@njit(f"void({ARRAYS},i8,i8)", cache=True, nogil=True)
def _unhash(t: Any, node: Any, token: Any) -> None:
    """Take a child's key out; later keys of its run move up, so that no tombstones remain."""
    keys, values, mask = t[KEYS], t[VALUES], len(t[KEYS]) - 1
    key = (np.int64(node) << 32) | np.int64(token)
    p = _slot_of(key, mask)
    while keys[p] != key:
        p = (p + 1) & mask
    hole, p = p, (p + 1) & mask
    while keys[p] >= 0:
        home = _slot_of(keys[p], mask)
        if ((p - home) & mask) >= ((p - hole) & mask):
            keys[hole], values[hole] = keys[p], values[p]
            hole = p
        p = (p + 1) & mask
    keys[hole] = -1


@njit(f"i8({ARRAYS},i8,i8)", cache=True, nogil=True)
def new_node(t: Any, parent: Any, token: Any) -> Any:
    """A node without children and count, first among its siblings; ``parent`` -1 makes a root. The caller ensured that there is room."""
    meta = t[META]
    meta[0] -= 1
    node = np.int64(t[FREE][meta[0]])
    meta[1] += 1
    t[TOKEN][node], t[PARENT][node], t[CHILD][node], t[NEXT][node], t[PREV][node] = token, parent, -1, -1, -1
    t[FREQ][node], t[SIZE][node] = 0, 0
    if parent >= 0:
        first = t[CHILD][parent]
        t[NEXT][node], t[CHILD][parent] = first, node
        if first >= 0:
            t[PREV][first] = node
        keys, mask = t[KEYS], len(t[KEYS]) - 1
        key = (np.int64(parent) << 32) | np.int64(token)
        p = _slot_of(key, mask)
        while keys[p] >= 0:
            p = (p + 1) & mask
        keys[p], t[VALUES][p] = key, node
    return node


@njit(f"i8({ARRAYS},i8,i8)", cache=True, nogil=True)
def free_below(t: Any, node: Any, most: Any) -> Any:
    """Free ``node`` and all below it; returns how many nodes that were. A root may be freed in parts of ``most`` nodes: minus the number
    if some are left.
    """
    parent, child, after, freed = t[PARENT], t[CHILD], t[NEXT], 0
    up, before = parent[node], t[PREV][node]
    if before >= 0:
        after[before] = after[node]
    elif up >= 0:
        child[up] = after[node]
    if after[node] >= 0:
        t[PREV][after[node]] = before
    current = node
    while True:
        while child[current] >= 0:
            current = child[current]
        above, sibling = parent[current], after[current]
        if above >= 0:
            _unhash(t, above, t[TOKEN][current])
        t[FREE][t[META][0]] = current
        t[META][0] += 1
        t[META][1] -= 1
        freed += 1
        if current == node:
            return freed
        child[above] = sibling
        if freed == most:
            return -freed
        current = above


@njit(f"i8({ARRAYS},i8)", cache=True, nogil=True)
def prune(t: Any, tree: Any) -> Any:
    """Halve every frequency above 1 in a tree and free every other node with what is below it; returns how many nodes were freed."""
    freed, current = 0, np.int64(t[CHILD][tree])
    if t[FREQ][tree] > 1:
        t[FREQ][tree] *= np.float32(0.5)
    while current >= 0:
        stays, ahead = t[FREQ][current] > 1, current
        if stays and t[CHILD][current] >= 0:
            ahead = np.int64(t[CHILD][current])
        else:
            while ahead != tree and t[NEXT][ahead] < 0:
                ahead = np.int64(t[PARENT][ahead])
            ahead = np.int64(-1) if ahead == tree else np.int64(t[NEXT][ahead])
        if stays:
            t[FREQ][current] *= np.float32(0.5)
        else:
            freed += free_below(t, current, ALL)
        current = ahead
    t[SIZE][tree] -= freed
    return freed


@njit(f"void({ARRAYS},i8,i4[::1],i8,i8,i8,i8,i8)", cache=True, nogil=True)
def put(t: Any, root: Any, data: Any, first: Any, last: Any, end: Any, depth: Any, limit: Any) -> None:
    """Insert data[i : i + 1 + depth] below ``root`` for each start i in [first, last), cut at ``end``; prune trees above ``limit`` nodes."""
    for i in range(first, last):
        tree = find(t, root, data[i])
        if tree < 0:
            tree = new_node(t, root, data[i])
        t[FREQ][tree] += np.float32(1)
        node = tree
        for j in range(i + 1, min(i + 1 + depth, end)):
            below = find(t, node, data[j])
            if below < 0:
                below = new_node(t, node, data[j])
                t[SIZE][tree] += 1
            t[FREQ][below] += np.float32(1)
            node = below
        if t[SIZE][tree] > limit:
            prune(t, tree)


@njit(f"i8({ARRAYS},i8)", cache=True, nogil=True)
def prune_root(t: Any, root: Any) -> Any:
    """Prune every tree below a root; trees seen once that are empty then go too. Returns how many nodes were freed."""
    freed, tree = 0, np.int64(t[CHILD][root])
    while tree >= 0:
        ahead = np.int64(t[NEXT][tree])
        once = t[FREQ][tree] <= 1
        freed += prune(t, tree)
        if once and t[CHILD][tree] < 0:
            freed += free_below(t, tree, ALL)
        tree = ahead
    return freed


@njit(f"void({ARRAYS})", cache=True, nogil=True)
def rehash(t: Any) -> None:
    """Fill empty KEYS and VALUES from the links of all nodes in use."""
    used = np.ones(len(t[TOKEN]), np.bool_)
    for i in range(t[META][0]):
        used[t[FREE][i]] = False
    keys, values, mask = t[KEYS], t[VALUES], len(t[KEYS]) - 1
    for node in range(len(used)):
        if used[node] and t[PARENT][node] >= 0:
            key = (np.int64(t[PARENT][node]) << 32) | np.int64(t[TOKEN][node])
            p = _slot_of(key, mask)
            while keys[p] >= 0:
                p = (p + 1) & mask
            keys[p], values[p] = key, node


class Trie:
    """Owner of the arrays. ``reserve`` before a kernel adds nodes."""

    def __init__(self, capacity: int = 1 << 12) -> None:
        self.arrays = _arrays(capacity)
        self.arrays[FREE][:] = np.arange(capacity - 1, -1, -1)
        self.arrays[META][:] = capacity, 0

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return int(self.arrays[META][1])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays)

    def reserve(self, nodes: int) -> None:
        """Make sure that ``nodes`` more nodes fit."""
        old, capacity = self.arrays, len(self.arrays[TOKEN])
        if old[META][0] >= nodes:
            return
        bigger = capacity
        while old[META][0] + bigger - capacity < nodes:
            bigger *= 2
        new = _arrays(bigger)
        for column in (TOKEN, PARENT, CHILD, NEXT, PREV, FREQ, SIZE):
            new[column][:capacity] = old[column]
        free = int(old[META][0])
        new[FREE][: bigger - capacity] = np.arange(bigger - 1, capacity - 1, -1)
        new[FREE][bigger - capacity : bigger - capacity + free] = old[FREE][:free]
        new[META][:] = free + bigger - capacity, old[META][1]
        self.arrays = new
        rehash(new)

    def root(self) -> int:
        """A new root."""
        self.reserve(1)
        return int(new_node(self.arrays, -1, 0))

    def free(self, root: int, most: int = ALL) -> int:
        """Free a root and everything below it, at most ``most`` nodes; returns how many, negative if some are left."""
        return int(free_below(self.arrays, root, most))


def _arrays(capacity: int) -> tuple[Longs, Ints, Ints, Ints, Ints, Ints, Ints, Singles, Ints, Ints, Longs]:
    links = [np.empty(capacity, np.int32) for _ in range(5)]
    return (
        np.full(2 * capacity, -1, np.int64), np.empty(2 * capacity, np.int32), links[0], links[1], links[2], links[3], links[4],
        np.zeros(capacity, np.float32), np.zeros(capacity, np.int32), np.empty(capacity, np.int32), np.zeros(2, np.int64),
    )  # fmt: skip
