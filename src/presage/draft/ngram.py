"""Prompt lookup (Saxena, 2023): guess that what followed the latest earlier occurrence of the last n ids follows again.

Every n-gram of lengths ``prompt_lookup_min`` to ``prompt_lookup_max`` is hashed once, when its last id arrives, so a step costs the same at
any context length. vLLM, whose setting names these are, copies from the earliest occurrence; the latest is a little better on recorded agent
calls (0 to 2 % more tokens a step), and reading on into the draft itself keeps it as long when a text repeats with a short period.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from presage.core.errors import ConfigError
from presage.core.plan import Draft
from presage.core.types import Ints, Longs
from presage.draft.host import Extents, HostDrafter, power_of_two
from presage.draft.sources import sources


@njit("i8(i4[::1],i4[::1],i8,i8,i8,i8,i8,u8,i8)", cache=True, nogil=True)
def _swap(table: Any, data: Any, tab: Any, mask: Any, start: Any, n: Any, orders: Any, h: Any, code: Any) -> Any:
    """Put the n-gram that ends at id ``code // orders`` into the table; returns where it ended before, -1 if it is new."""
    end, kind = code // orders, code % orders
    p = np.int64(h & np.uint64(mask))
    while True:
        e = table[tab + p]
        if e < 0:
            table[tab + p] = code
            return -1
        if e % orders == kind:
            at, same = e // orders, True
            for j in range(n):
                if data[start + at - j] != data[start + end - j]:
                    same = False
                    break
            if same:
                table[tab + p] = code
                return at
        p = (p + 1) & mask


@njit("void(i4[::1],i8[::1],i4[::1],i8[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i8,i8)", cache=True, nogil=True)
def _index(
    data: Any, start: Any, table: Any, tab: Any, size: Any, done: Any, source: Any, found: Any, slots: Any, upto: Any, low: Any, high: Any
) -> None:
    """Index ids [done, upto) of each slot; ``source``: id after the latest match of the last ids, ``found``: length of that match or 0."""
    orders = high - low + 1
    for i in range(len(slots)):
        s = slots[i]
        for end in range(done[s], upto[i]):
            h, matching = np.uint64(0x9E3779B97F4A7C15), True
            found[s] = 0
            for n in range(1, min(high, end + 1) + 1):
                h = (h ^ np.uint64(data[start[s] + end - n + 1])) * np.uint64(0xBF58476D1CE4E5B9)
                h ^= h >> np.uint64(29)
                if n < low:
                    continue
                at = _swap(table, data, tab[s], np.int64(size[s]) - 1, start[s], n, orders, h, np.int64(end) * orders + n - low)
                matching = matching and at >= 0
                if matching:
                    source[s], found[s] = at + 1, n
        done[s] = upto[i]


@njit(cache=True, nogil=True)
def _copy(data: Any, start: Any, length: Any, done: Any, source: Any, found: Any, slots: Any, budget: Any, offset: Any, out: Any) -> None:
    """Chains: the ids from ``source`` on; beyond the last id it goes on with the draft's own first ids. ``out``: token, parent, depth, prob."""
    token, parent, depth, prob = out
    at = np.int32(0)
    for i in range(len(slots)):
        s, first, sure = slots[i], at, np.float32(1)
        # Ids that still wait for the quota: what was found is not about the last ones.
        for j in range(budget[i] if found[s] > 0 and done[s] == length[s] else 0):
            k = source[s] + j
            token[at] = data[start[s] + k] if k < length[s] else token[first + k - length[s]]
            sure *= np.float32(found[s]) / np.float32(found[s] + 1)
            parent[at], depth[at], prob[at] = j - 1, j + 1, sure
            at += 1
        offset[i + 1] = at


class NgramDrafter(HostDrafter):
    """Chains copied from earlier in the prompt and response.

    ``prompt_lookup_min``, ``prompt_lookup_max``: shortest and longest match in ids; one given alone is both, none gives 2 to 5.
    ``prob``: (n / (n + 1)) ** depth for a match of n ids, a prior for controllers to calibrate. Raises ConfigError for lengths outside
    1 <= min <= max <= 16.
    """

    source = "ngram"

    def __init__(self, num_speculative_tokens: int = 8, prompt_lookup_min: int | None = None, prompt_lookup_max: int | None = None) -> None:
        super().__init__(num_speculative_tokens)
        if prompt_lookup_min is None and prompt_lookup_max is None:
            prompt_lookup_min, prompt_lookup_max = 2, 5
        self.low, self.high = prompt_lookup_min or prompt_lookup_max or 0, prompt_lookup_max or prompt_lookup_min or 0
        if not 1 <= self.low <= self.high <= 16:
            raise ConfigError(f"need 1 <= prompt_lookup_min ({self.low}) <= prompt_lookup_max ({self.high}) <= 16", param="prompt_lookup_min")
        self.tables = Extents()
        self.tab: Longs = np.zeros(8, np.int64)
        self.size, self.match, self.found = (np.zeros(8, np.int32) for _ in range(3))

    def draft(self, slots: Ints, budget: Ints) -> Draft:
        """Chains [G] of ``budget`` ids where the last ids occurred before, else none."""
        total, offset = int(budget.sum()), np.zeros(len(slots) + 1, np.int32)
        token, parent, depth = (np.empty(total, np.int32) for _ in range(3))
        prob = np.empty(total, np.float32)
        _copy(
            self.tokens.data, self.start, self.length, self.done, self.match, self.found, slots, budget, offset, (token, parent, depth, prob)
        )  # fmt: skip
        n = int(offset[-1])
        return Draft(offset, token[:n], parent[:n], depth[:n], prob[:n], sources(n, self.source))

    def _promising(self) -> np.ndarray:
        return self.found > 0

    def _index(self, slots: Ints, upto: Ints) -> None:
        orders = self.high - self.low + 1
        for i in np.flatnonzero(3 * orders * upto > 2 * self.size[slots]).tolist():
            self._grow(int(slots[i]), (int(self.length[slots[i]]) + 256) * orders)
        _index(
            self.tokens.data, self.start, self.tables.data, self.tab, self.size, self.done, self.match, self.found, slots, upto, self.low, self.high
        )  # fmt: skip

    def _grow(self, slot: int, entries: int) -> None:
        """An empty table at most half full with what is at hand; what was indexed is indexed again."""
        self._drop(slot)
        size = power_of_two(2 * entries)
        self.tab[slot], self.size[slot], self.done[slot] = self.tables.take(size), size, 0
        self._empty(slot)

    def _empty(self, slot: int) -> None:
        a = int(self.tab[slot])
        self.tables.data[a : a + int(self.size[slot])] = -1
        self.found[slot] = 0

    def _forget(self, slot: int, known: int) -> None:
        self.done[slot] = 0
        self._empty(slot)

    def _drop(self, slot: int) -> None:
        self.tables.give(int(self.tab[slot]), int(self.size[slot]))
        self.size[slot] = self.found[slot] = 0
