"""What drafters that look tokens up have in common: every slot's ids in one flat array, a cap per request, and indexing by quota.

Indexing a long prompt is spread over the steps in which the prompt itself is computed, by a quota of tokens (never of time: replays would
differ).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

import numpy as np
from numba import njit

from presage.core.errors import ConfigError, RequestError
from presage.core.plan import Draft, Grants, NewIds, StepDone, StepPlan
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Ints, Longs


@njit("i8(i4[::1],i8[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i4[::1],i8,i8,i4[::1],i4[::1])", cache=True, nogil=True)
def take_in(
    data: Any, start: Any, room: Any, length: Any, prompt: Any, done: Any, cap: Any, slots: Any, off: Any, ids: Any, quota: Any, lag: Any,
    some: Any, upto: Any,
) -> Any:  # fmt: skip
    """Write the new ids of each slot behind those it has, then share out the quota in order.

    Returns how many slots are to be indexed, ``some``[:n] up to ``upto``[:n]; or -1, with nothing done, if a slot's piece is too small.
    """
    for i in range(len(slots)):
        if length[slots[i]] + off[i + 1] - off[i] > room[slots[i]]:
            return -1
    for i in range(len(slots)):
        s = slots[i]
        at = start[s] + length[s]
        for j in range(off[i], off[i + 1]):
            data[at] = ids[j]
            at += 1
        length[s] += off[i + 1] - off[i]
    n, left = 0, quota
    for i in range(len(slots)):
        s = slots[i]
        behind = np.int64(0) if done[s] < prompt[s] else lag
        want = min(length[s] - done[s] - behind, left)
        if want > 0 and cap[s] > 0:
            some[n], upto[n] = s, done[s] + want + behind
            n, left = n + 1, left - want
    return n


class Extents:
    """Pieces of one int32 array ``data`` for kernels that see all slots at once. Sizes are powers of two, pieces are reused by size."""

    def __init__(self) -> None:
        self.data: Ints = np.empty(1 << 14, np.int32)
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> int:
        """Start of a piece of ``size`` (a power of two); what it holds is undefined."""
        if self._free.get(size):
            return self._free[size].pop()
        start, self._end = self._end, self._end + size
        if self._end > len(self.data):
            bigger = np.empty(max(2 * len(self.data), self._end), np.int32)
            bigger[:start] = self.data[:start]
            self.data = bigger
        return start

    def give(self, start: int, size: int) -> None:
        """Return a piece."""
        if size:
            self._free.setdefault(size, []).append(start)


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


class HostDrafter(ABC):
    """Base of drafters without forward passes of their own; a subclass says how to index ids and how to look drafts up.

    ``quota``: ids indexed per ``advance``; ``lag``: last ids of an output that a subclass leaves out until more follow.

    Columns by slot: ``start``, ``room``, ``length``: the slot's piece of ``tokens.data``; ``prompt``: length of the prompt; ``done``: ids
    indexed so far; ``cap``: most draft nodes (0: closed, or the request opted out). ``num_speculative_tokens`` is the default cap; a
    request's ``draft["num_speculative_tokens"]`` lowers it, ``draft["method"] == "none"`` opts out. Raises RequestError for other values.
    """

    host = True
    quota = 8192
    lag = 0

    def __init__(self, num_speculative_tokens: int) -> None:
        if num_speculative_tokens < 1:
            raise ConfigError(f"num_speculative_tokens must be at least 1, not {num_speculative_tokens}", param="num_speculative_tokens")
        self.num_speculative_tokens = num_speculative_tokens
        self.tokens = Extents()
        self.start: Longs = np.zeros(8, np.int64)
        self.room, self.length, self.prompt, self.done, self.cap = (np.zeros(8, np.int32) for _ in range(5))
        self._some, self._upto = (np.zeros(8, np.int32) for _ in range(2))

    # ---- companion

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot."""
        cap = self._cap_of(req)
        while slot >= len(self.start):
            self._widen()
        ids = np.concatenate([req.prompt, req.emitted]).astype(np.int32)
        self.prompt[slot], self.cap[slot] = len(req.prompt), cap
        self._fill(slot, ids)

    def advance(self, new: NewIds) -> None:
        """Take in committed ids, then index what the quota allows."""
        n = self._take_in(new)
        if n < 0:
            upto = self.length[new.slot] + np.diff(new.off)
            for i in np.flatnonzero(upto > self.room[new.slot]).tolist():
                self._reserve(int(new.slot[i]), int(upto[i]))
            n = self._take_in(new)
        if n:
            self._index(self._some[:n], self._upto[:n])

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``."""
        if known < self.length[slot]:
            self.length[slot] = known
            self._forget(slot, known)

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` (open already) starts as a copy of ``src``; its own index is built anew."""
        self.close(dst)
        self.open(dst, req)
        a, n = int(self.start[src]), int(self.length[src])
        self._reserve(dst, n)
        b = int(self.start[dst])
        self.tokens.data[b : b + n] = self.tokens.data[a : a + n]
        self.length[dst], self.prompt[dst] = n, min(n, int(self.prompt[src]))
        self._forget(dst, 0)

    def save(self, slot: int) -> bytes | None:
        """Nothing: the receiver rebuilds from the ids."""
        return None

    def load(self, slot: int, blob: bytes) -> None:
        """Never called, as ``save`` gives nothing. Raises ConfigError: the blob is another drafter's."""
        raise ConfigError(f"{type(self).__name__} keeps no state to load", param="speculative_config")

    def close(self, slot: int) -> None:
        """The request left the slot."""
        self._drop(slot)
        self.tokens.give(int(self.start[slot]), int(self.room[slot]))
        self.start[slot] = self.room[slot] = self.length[slot] = self.prompt[slot] = self.done[slot] = self.cap[slot] = 0

    # ---- drafter

    def hint(self, view: EngineView) -> Ints:
        """Most nodes [C] each slot could get. Where ids are still in flight nothing can be looked up yet, so it is the cap."""
        n = len(view.known)
        out = np.zeros(n, np.int32)
        m = min(n, len(self.cap))
        out[:m] = self.cap[:m]
        current = self.length[:m] == view.known[:m]
        out[:m][current & ~self._promising()[:m]] = 0
        return out

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """Drafts for all grants in one call; yields nothing."""
        yield from ()
        return self.draft(grants.slot, np.minimum(grants.draft, self.cap[grants.slot]).astype(np.int32))

    def shut(self) -> None:
        """The engine closes; nothing is to outlive it."""
        return

    @abstractmethod
    def draft(self, slots: Ints, budget: Ints) -> Draft:
        """At most ``budget`` [G] nodes for each of ``slots`` [G]."""

    # ---- for subclasses

    @abstractmethod
    def _index(self, slots: Ints, upto: Ints) -> None:
        """Index ids [done, upto) of each slot and set ``done``."""

    def _promising(self) -> np.ndarray:
        """Mask by slot: a look-up may find something."""
        return self.length > 0

    def _forget(self, slot: int, known: int) -> None:
        """``length`` fell to ``known``: what was indexed beyond it must go."""
        self.done[slot] = min(int(self.done[slot]), known)

    @abstractmethod
    def _drop(self, slot: int) -> None:
        """Free what a subclass holds for the slot."""

    def _cap_of(self, req: Request) -> int:
        asked = req.draft or {}
        most = asked.get("num_speculative_tokens", self.num_speculative_tokens)
        if not isinstance(most, int) or most < 0:
            raise RequestError(f"num_speculative_tokens must be a number of tokens, not {most!r}", param="draft")
        return 0 if asked.get("method") == "none" else min(self.num_speculative_tokens, most)

    def _take_in(self, new: NewIds) -> int:
        if len(self._some) < len(new.slot):
            self._some, self._upto = (np.zeros(2 * len(new.slot), np.int32) for _ in range(2))
        return int(
            take_in(
                self.tokens.data, self.start, self.room, self.length, self.prompt, self.done, self.cap, new.slot, new.off, new.ids, self.quota,
                self.lag, self._some, self._upto,
            )
        )  # fmt: skip

    def _fill(self, slot: int, ids: Ints) -> None:
        self._reserve(slot, len(ids) + 64)
        a = int(self.start[slot])
        self.tokens.data[a : a + len(ids)] = ids
        self.length[slot], self.done[slot] = len(ids), 0

    def _reserve(self, slot: int, n: int) -> None:
        """Room for ``n`` ids, those there are kept."""
        old, size = int(self.room[slot]), power_of_two(n)
        if size <= old:
            return
        a, b, kept = int(self.start[slot]), self.tokens.take(size), int(self.length[slot])
        self.tokens.data[b : b + kept] = self.tokens.data[a : a + kept]
        self.tokens.give(a, old)
        self.start[slot], self.room[slot] = b, size

    def _widen(self) -> None:
        """Double the columns."""
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
