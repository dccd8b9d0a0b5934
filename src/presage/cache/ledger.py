"""What blocks cost while a plan is made. Reads the manager, changes nothing in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from presage.cache.geometry import peak_blocks
from presage.core.types import Ints, Longs

if TYPE_CHECKING:
    from presage.cache.manager import BlockManager

HIT = 1
"""The slot has a remembered prefix hit (possibly of no block) that the next grant will pin."""
COPY = 2
"""The slot's last, partial block may be shared or published: look before the next write."""


@numba.njit(cache=True)
def _cold(slots, todo, blocks, table, refs):  # type: ignore[no-untyped-def]
    """Per slot, remembered blocks without any reference: pinning takes them from the free ones."""
    out = np.zeros(len(slots), np.int64)
    for i, s in enumerate(slots):
        if todo[s] & 1:
            for j in range(blocks[s]):
                b = table[s, j]
                out[i] += b > 0 and refs[b] == 0
    return out


@numba.njit(cache=True)
def _need(slots, upto, block, owned, todo, out):  # type: ignore[no-untyped-def]
    """Blocks above what each slot owns in one pool (below zero: it owns more); returns whether any slot has something to look at first."""
    found = False
    for i in range(len(slots)):
        s = slots[i]
        out[i] = (upto[i] + block - 1) // block - owned[s]
        found = found or todo[s] != 0
    return found


class BlockLedger:
    """Prices for one plan; ``free`` is a copy. Implements ``core.protocols.Ledger``.

    Never too optimistic: what the plan takes fits at apply. It is exact unless slots of one plan meet in the same block, namely two
    admissions that hit the same unreferenced block (each is charged), or a victim that shares blocks with a waiting hit (not credited).
    """

    def __init__(self, kv: BlockManager) -> None:
        self._kv = kv
        self.free: Longs = np.array([p.free for p in kv.pools], np.int64)
        self._left: list[np.ndarray] | None = None

    def need(self, slots: Ints, upto: Ints) -> Longs:
        """Blocks [n, POOLS] to take so that each slot can hold ``upto`` tokens: above what it owns, or above its prefix hit."""
        kv = self._kv
        out, found = np.empty((len(slots), len(kv.pools)), np.int64), False
        for g, owned in enumerate(kv.owned):
            found = _need(slots, upto, kv.block_tokens, owned, kv.todo, out[:, g]) or found
        if found:
            self._add_todo(out, slots, kv.todo[slots])
        return np.maximum(out, 0, out=out)

    def _add_todo(self, out: Longs, slots: Ints, todo: np.ndarray) -> None:
        kv = self._kv
        kv.refit(slots[(todo & HIT) > 0])
        for g, pool in enumerate(kv.pools):
            if pool.lead:
                reused = np.where(todo & HIT, kv.hit[slots], 0)
                out[:, g] = np.maximum(out[:, g] - reused, 0) + _cold(slots, kv.todo, kv.hit, kv.hits[g], pool.refs)
        for i in np.flatnonzero(todo & COPY).tolist():
            out[i] = np.maximum(out[i], 0)
            for g, _ in kv.shared_tails(int(slots[i])):
                out[i, g] += 1

    def whole(self, slot: int, upto: int) -> Longs:
        """Most blocks [POOLS] the slot holds at once while it grows to ``upto`` tokens in chunks (window groups stay bounded)."""
        chunk = self._kv.max_num_batched_tokens
        return np.array([peak_blocks(p.group, upto, chunk) for p in self._kv.pools], np.int64)

    def take(self, blocks: Longs) -> bool:
        """Subtract [POOLS] from ``free`` if it fits; False and no effect otherwise."""
        if (blocks > self.free).any():
            return False
        self.free = self.free - blocks
        return True

    def give(self, slot: int) -> None:
        """Add what evicting the slot frees: blocks that only it (or slots given before) holds and that no waiting hit counts on."""
        kv = self._kv
        if self._left is None:
            self._left = [p.refs.copy() for p in kv.pools]
            # `need` charged nothing for hits somebody holds, so these must not be counted as freed: they stay in use.
            for slot_hit in np.flatnonzero(kv.todo & HIT).tolist():
                for left, hits in zip(self._left, kv.hits, strict=True):
                    left[hits[slot_hit, : kv.hit[slot_hit]]] += 1
        for g, left in enumerate(self._left):
            row = kv.tables[g][slot, : kv.owned[g][slot]]
            row = row[row > 0]
            left[row] -= 1
            self.free[g] += np.count_nonzero(left[row] == 0)
