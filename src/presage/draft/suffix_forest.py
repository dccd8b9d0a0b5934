"""The pools behind the suffix kernels: room, growth, roots, rebuilding, and whole sequences in and out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from presage.core.errors import ConfigError
from presage.core.types import Ints, Longs
from presage.draft import suffix_tree as k
from presage.draft.suffix_draft import append_many

DEEPEST = 255


class Forest:
    """Any number of suffix trees of one ``depth`` (2..255) in shared ``pools``: ``ctl``, ``S``, ``E``, ``B`` of ``suffix_tree``.

    Raises ConfigError for another depth.
    """

    def __init__(self, depth: int, states: int = 1 << 12) -> None:
        if not 2 <= depth <= DEEPEST:
            raise ConfigError(f"the depth of a suffix tree must be 2 to {DEEPEST}, not {depth}", param="suffix_decoding_max_tree_depth")
        self.depth = depth
        self.work = np.empty((3, k.SCRATCH), np.int64), np.empty((2, DEEPEST + 1), np.int64)
        self.clear(states)

    def clear(self, states: int = 1 << 12) -> None:
        """Forget everything, roots too."""
        self.ctl: Longs = np.zeros(k.CTL, np.int64)
        self._hold(np.empty((states, 8), np.int32), np.empty((states, 8), np.int32), np.empty(1 << (states - 1).bit_length(), np.int32))
        self.ctl[[k.SFREE, k.EFREE, k.RFREE]] = -1
        self.ctl[k.DEPTH] = self.depth
        self.root()  # state 0 is nobody's: kernels read 0 as "none"

    def nbytes(self) -> int:
        """Bytes that live states and edges and the hash take. Pools are a half larger at most; pages never written cost nothing."""
        return int(32 * self.ctl[k.STATES] + 32 * self.ctl[k.EDGES] + self.B.nbytes)

    def reserved(self) -> int:
        """Bytes of the pools."""
        return self.S.nbytes + self.E.nbytes + self.B.nbytes

    def root(self) -> int:
        """A new empty tree."""
        if self.ctl[k.STATES] + 2 > len(self.S):
            self.grow()
        return int(k.new_state(self.ctl, self.S, 0, -1, -1))

    def drop_root(self, root: int) -> None:
        """Give an empty tree's root back."""
        k.free_state(self.ctl, self.S, root)

    def grow(self) -> None:
        """Room for half as many states and edges again, whichever are short."""
        states, edges, buckets = self.S, self.E, self.B
        if self.ctl[k.STATES] + 2 > 0.9 * len(states):
            states = _longer(states, len(states) * 3 // 2)
        if self.ctl[k.EDGES] > 0.75 * len(edges) or self.ctl[k.STATES] + 2 <= len(self.S):
            edges = _longer(edges, len(edges) * 3 // 2)
        if len(edges) > len(buckets):
            buckets = np.empty(2 * len(buckets), np.int32)
        self._hold(states, edges, buckets)

    def _hold(self, states: Ints, edges: Ints, buckets: Ints) -> None:
        """Pools change together with the tuple of them that every kernel takes first."""
        stale = self.ctl[k.MASK] != len(buckets) - 1
        self.S, self.E, self.B = states, edges, buckets
        self.pools: tuple[Longs, Ints, Ints, Ints] = (self.ctl, states, edges, buckets)
        self.ctl[k.MASK] = len(buckets) - 1
        if stale:
            k.rehash(self.ctl, edges, buckets)

    def extend(self, root: int, cursors: Longs, sequences: Sequence[Ints], owners: Ints) -> None:
        """Append each of ``sequences`` at its cursor [n] (a root starts a new one); cursors move, ``owners`` [n] are the writers' numbers."""
        ids = np.concatenate([*sequences, np.empty(0, np.int32)]).astype(np.int32)
        off = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
        done = np.zeros(len(cursors), np.int64)
        while not append_many(*self.pools, root, ids, off, cursors, done, owners, self.work[0]):
            self.grow()

    def remove(self, root: int, ids: Ints, known: int = 0) -> int:
        """Take back the ids at and after ``known`` of the sequence ``ids``; returns its cursor there."""
        return int(k.remove_tail(*self.pools, root, ids, known, len(ids), *self.work))

    def count(self, root: int, string: Ints) -> int:
        """Occurrences of a string of at most ``depth`` ids."""
        v, size = k.match(*self.pools, root, np.asarray(string, np.int32), 0, len(string))
        return int(self.S[v, k.COUNT]) if size == len(string) else 0


def _longer(pool: Ints, rows: int) -> Ints:
    out: Ints = np.empty((rows, pool.shape[1]), np.int32)
    out[: len(pool)] = pool
    return out
