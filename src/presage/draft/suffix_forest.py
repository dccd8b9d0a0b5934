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
    """Any number of suffix trees of one ``depth`` (2..255) in shared pools: ``ctl``, ``S``, ``E``, ``B`` of ``suffix_tree``.

    Raises ConfigError for another depth.
    """

    def __init__(self, depth: int, states: int = 1 << 12) -> None:
        if not 2 <= depth <= DEEPEST:
            raise ConfigError(f"the depth of a suffix tree must be 2 to {DEEPEST}, not {depth}", param="suffix_decoding_max_tree_depth")
        self.depth = depth
        self.clear(states)

    def clear(self, states: int = 1 << 12) -> None:
        """Forget everything, roots too."""
        self.S: Ints = np.empty((states, 8), np.int32)
        self.E: Ints = np.empty((states, 8), np.int32)
        self.B: Ints = np.full(1 << (states - 1).bit_length(), -1, np.int32)
        self.ctl: Longs = np.zeros(k.CTL, np.int64)
        self.ctl[[k.SFREE, k.EFREE, k.RFREE]] = -1
        self.ctl[k.MASK], self.ctl[k.DEPTH] = len(self.B) - 1, self.depth
        self.root()  # state 0 is nobody's: kernels read 0 as "none"

    @property
    def pools(self) -> tuple[Longs, Ints, Ints, Ints]:
        """What every kernel takes first."""
        return self.ctl, self.S, self.E, self.B

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
        if self.ctl[k.STATES] + 2 > 0.9 * len(self.S):
            self.S = _longer(self.S, len(self.S) * 3 // 2)
        if self.ctl[k.EDGES] > 0.75 * len(self.E) or self.ctl[k.STATES] + 2 <= len(self.S):
            self.E = _longer(self.E, len(self.E) * 3 // 2)
        if len(self.E) > 2 * len(self.B):
            self.B = np.empty(2 * len(self.B), np.int32)
            self.ctl[k.MASK] = len(self.B) - 1
            k.rehash(self.ctl, self.E, self.B)

    def extend(self, root: int, cursors: Longs, sequences: Sequence[Ints], owners: Ints) -> None:
        """Append each of ``sequences`` at its cursor [n] (a root starts a new one); cursors move, ``owners`` [n] are the writers' numbers."""
        ids = np.concatenate([*sequences, np.empty(0, np.int32)]).astype(np.int32)
        off = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
        done = np.zeros(len(cursors), np.int64)
        while not append_many(*self.pools, root, ids, off, cursors, done, owners):
            self.grow()

    def remove(self, root: int, ids: Ints, known: int = 0) -> int:
        """Take back the ids at and after ``known`` of the sequence ``ids``; returns its cursor there."""
        return int(k.remove_tail(*self.pools, root, ids, known, len(ids)))

    def count(self, root: int, string: Ints) -> int:
        """Occurrences of a string of at most ``depth`` ids."""
        v, size = k.match(*self.pools, root, np.asarray(string, np.int32), 0, len(string))
        return int(self.S[v, k.COUNT]) if size == len(string) else 0


def _longer(pool: Ints, rows: int) -> Ints:
    out: Ints = np.empty((rows, pool.shape[1]), np.int32)
    out[: len(pool)] = pool
    return out
