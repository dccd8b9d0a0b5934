"""The responses a suffix drafter remembers: one shared tree per namespace, who wrote what, and who goes when there are too many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from presage.core.errors import ConfigError
from presage.core.types import EMPTY, Ints
from presage.draft.suffix_forest import Forest

Key = tuple[str, str, str, str]  # model, adapter, tenant, salt (hex)


@dataclass(slots=True)
class Entry:
    """One response: its namespace, its ids, and the slot of the request while that runs (-1 later; ``ids`` are complete then).

    ``kept``: it goes to disk with the others; not so what came from a file that is read at every start.
    """

    key: Key
    slot: int
    ids: Ints
    kept: bool = True


class Library:
    """Past and running responses by number (the order they began in), in shared trees by namespace.

    At most ``max_requests`` responses (-1: any number, 0: none at all) and ``max_tokens`` ids (-1: any number). ``eviction`` is "fifo" or
    "lru": the one that longest gave no accepted draft. Raises ConfigError for another word.
    """

    def __init__(self, forest: Forest, max_requests: int = 10000, max_tokens: int = -1, eviction: str = "fifo") -> None:
        if eviction not in ("fifo", "lru"):
            raise ConfigError(f"eviction must be fifo or lru, not {eviction!r}", param="eviction")
        self.forest, self.max_requests, self.max_tokens, self.lru = forest, max_requests, max_tokens, eviction == "lru"
        self.roots: dict[Key, int] = {}
        self.entries: dict[int, Entry] = {}
        self.tokens = 0
        self._next = 0

    def root(self, key: Key) -> int:
        """The namespace's tree, made if it is new."""
        if key not in self.roots:
            self.roots[key] = self.forest.root()
        return self.roots[key]

    def begin(self, key: Key, slot: int) -> int:
        """Number of a new response."""
        owner = self._next
        while owner in self.entries:
            owner = (owner + 1) & 0x7FFFFFFF
        self._next = (owner + 1) & 0x7FFFFFFF
        self.entries[owner] = Entry(key, slot, EMPTY)
        return owner

    def finish(self, owner: int, ids: Ints) -> None:
        """A running response is complete; all its ids are in the tree. An empty one is forgotten."""
        entry = self.entries[owner]
        entry.slot, entry.ids = -1, ids
        self.tokens += len(ids)
        if not len(ids):
            del self.entries[owner]

    def touch(self, owner: int) -> None:
        """A draft from this response was accepted."""
        entry = self.entries.pop(owner, None)
        if entry is not None:
            self.entries[owner] = entry

    def victim(self, spare: int = -1) -> int:
        """Number of the response to give up now, -1 if all may stay. The one numbered ``spare`` is never chosen."""
        over = 0 <= self.max_requests < len(self.entries) or 0 <= self.max_tokens < self.tokens
        return next((owner for owner in self.entries if owner != spare), -1) if over else -1

    def forget(self, owner: int) -> Entry:
        """Take a response off the list; what is in its tree is the caller's to remove."""
        entry = self.entries.pop(owner)
        self.tokens -= len(entry.ids)
        return entry

    def add(self, sequences: list[tuple[Key, Ints]], kept: bool = True) -> int:
        """Store complete responses, oldest first; of too many only the last. Returns how many were stored; older ones may be victims now."""
        keep = sequences if self.max_requests < 0 else sequences[max(0, len(sequences) - self.max_requests) :]
        groups: dict[Key, list[tuple[int, Ints]]] = {}
        for key, ids in keep:
            if len(ids):
                owner = self.begin(key, -1)
                groups.setdefault(key, []).append((owner, ids))
                self.entries[owner].kept = kept
                self.finish(owner, ids)
        for key, group in groups.items():
            self._insert(key, group)
        return sum(len(group) for group in groups.values())

    def rebuild(self) -> None:
        """Insert all complete responses into emptied pools; running ones are the drafter's to insert again."""
        groups: dict[Key, list[tuple[int, Ints]]] = {key: [] for key in self.roots}
        self.roots.clear()
        for owner, entry in self.entries.items():
            if entry.slot < 0:
                groups[entry.key].append((owner, entry.ids))
        for key, group in groups.items():
            self._insert(key, group)

    def _insert(self, key: Key, group: list[tuple[int, Ints]]) -> None:
        root = self.root(key)
        cursors = np.full(len(group), root, np.int64)
        self.forest.extend(root, cursors, [ids for _, ids in group], np.array([owner for owner, _ in group], np.int32))
