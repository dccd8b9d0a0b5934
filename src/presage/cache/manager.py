"""Who owns which block: tables, prefix hits, copy-on-write, publication, windows. Called by the loop only.

Paged KV after vLLM (arXiv 2309.06180), hybrid groups after Jenga (arXiv 2503.18292). One pool per KV group, all of the same
``block_tokens``. Hot state is arrays by slot, so that a decode batch in which nothing happens costs a few numpy calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numba import njit

from presage.cache.audit import audit
from presage.cache.content import Content, HashedContent
from presage.cache.ledger import COPY, HIT, BlockLedger
from presage.cache.pool import Pool
from presage.cache.prefix import longest_prefix
from presage.core.config import EngineConfig
from presage.core.errors import AuditFailed, ConfigError
from presage.core.kv import KVGeometry
from presage.core.plan import Moves
from presage.core.request import Request
from presage.core.types import Ints

_NEVER = np.iinfo(np.int32).max
"""``sealed`` of a slot whose KV predates ``reset``: it matches the old weights, so none of it may be published."""


@njit(cache=True)
def _lacking(slots, want, owned):  # type: ignore[no-untyped-def]
    """Blocks the slots lack; -1 if they are not distinct."""
    total = 0
    for i in range(len(slots)):
        total += want[i] - owned[slots[i]]
        for j in range(i):
            if slots[j] == slots[i]:
                return -1
    return total


@njit(cache=True)
def _give(slots, want, owned, table, blocks):  # type: ignore[no-untyped-def]
    """Append blocks to the slots' tables."""
    at = 0
    for i in range(len(slots)):
        s = slots[i]
        for j in range(owned[s], want[i]):
            table[s, j] = blocks[at]
            at += 1
        owned[s] = want[i]


@njit(cache=True)
def _short(slots, upto, block, owned):  # type: ignore[no-untyped-def]
    """Indices of the slots that own fewer blocks than they need."""
    out, n = np.empty(len(slots), np.int64), 0
    for i in range(len(slots)):
        if (upto[i] + block - 1) // block > owned[slots[i]]:
            out[n] = i
            n += 1
    return out[:n]


@njit(cache=True)
def _flagged(slots, todo):  # type: ignore[no-untyped-def]
    """Whether a slot has something to do before it may be written."""
    for s in slots:  # noqa: SIM110 (numba compiles the loop, not the generator)
        if todo[s]:
            return True
    return False


class BlockManager:
    """Implements ``core.protocols.KVCache``.

    ``tables[g]`` [capacity, max_blocks] int32: physical block by logical block, 0 = none or freed by the window. ``owned[g]``
    [capacity]: logical blocks allocated, window-freed leading ones included. ``lengths`` [capacity]: committed tokens the slot holds;
    after ``apply`` of a new slot it is the prefix hit, after ``truncate`` and ``fork`` what could be kept. ``version`` rises when
    something was published, evicted or reset. Groups of other lanes than 0 are allocated alike but neither matched, shared by ``fork``,
    published nor freed by window: only the lead lane's computed length is known here.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        capacity: int = 64,
        *,
        max_len: int,
        prefix_caching: bool = True,
        content: Content | None = None,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        sizes = {g.block_tokens for g in geometry.groups}
        if len(sizes) != 1:
            raise ConfigError(f"all KV groups must have the same block_tokens, not {sorted(sizes)}")
        self.geometry, self.block_tokens = geometry, sizes.pop()
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pools = [Pool(g, n) for g, n in zip(geometry.groups, geometry.num_blocks, strict=True)]
        self._lead = [(g, p) for g, p in enumerate(self.pools) if p.lead]
        # A hit needs every lead group, so one group that does not publish makes publishing the others pointless.
        self.caching = prefix_caching and all(p.group.publish == "exact" for _, p in self._lead)
        self._content: Content = content or HashedContent()
        self._blocks = -(-max_len // self.block_tokens)
        self._roots: dict[int, bytes] = {}
        self._chains: dict[int, list[bytes]] = {}
        self._limbo: list[tuple[Pool, int]] = []
        self._queries = self._hit_tokens = self._published = self.version = 0
        self._allocate(capacity)

    def _allocate(self, n: int) -> None:
        pools = self.pools
        self.tables = tuple(np.zeros((n, self._blocks), np.int32) for _ in pools)
        self.hits = tuple(np.zeros((n, self._blocks), np.int32) for _ in pools)
        self.owned = tuple(np.zeros(n, np.int32) for _ in pools)
        self.gone = tuple(np.full(n, p.sinks, np.int32) for p in pools)
        self.lengths, self.sealed, self.hit, self.asked = (np.zeros(n, np.int32) for _ in range(4))
        self.seen = np.full(n, -1, np.int64)
        self.todo = np.zeros(n, np.uint8)

    def grow(self, capacity: int) -> None:
        """Make room for slots below ``capacity``; what exists stays. ``tables`` and the other arrays are replaced."""
        old = len(self.lengths)
        if capacity <= old:
            return
        before = dict(vars(self))
        self._allocate(capacity)
        for name in ("tables", "hits", "owned", "gone"):
            for new, was in zip(getattr(self, name), before[name], strict=True):
                new[:old] = was
        for name in ("lengths", "sealed", "hit", "asked", "seen", "todo"):
            getattr(self, name)[:old] = before[name]

    @property
    def evictions(self) -> int:
        """Names erased so far, over all pools."""
        return sum(p.evictions for p in self.pools)

    def _renew(self) -> None:
        self.version = self._published + self.evictions

    def open(self, slot: int, req: Request) -> None:
        """A request takes the slot: its hash chain starts at its salt, model and adapter."""
        if slot >= len(self.lengths):
            self.grow(max(slot + 1, 2 * len(self.lengths)))
        if slot in self._roots:
            raise AuditFailed(f"slot {slot} was opened twice")
        self._roots[slot] = self._content.root(slot, req, self.geometry.groups)
        self._chains[slot] = []

    def chain(self, slot: int) -> list[bytes]:
        """Names of the slot's full blocks as far as they were needed (for the log)."""
        return list(self._chains[slot])

    def match(self, slot: int, ids: np.ndarray) -> int:
        """Longest cached prefix of ``ids`` (the slot's known ids) in tokens, at most len(ids) - 1. Remembered until ``apply``, not pinned.

        Zero if caching is off; a slot that owns blocks keeps what it has and returns that.
        """
        if any(owned[slot] for owned in self.owned) or not self.caching:
            return int(self.lengths[slot])
        evictions = self.evictions
        # With nothing evicted since the last look, the blocks found then are still there.
        start = int(self.hit[slot]) if self.todo[slot] & HIT and self.seen[slot] == evictions else 0
        limit = min(len(ids) - 1, self._blocks * self.block_tokens) // self.block_tokens
        chain = self._chains[slot]
        known = self.todo[slot] & HIT and self.hit[slot] == start < min(limit, len(chain))
        if known and any(chain[start] not in p.where for _, p in self._lead if not p.window):
            # What ended the hit then still does.
            self.seen[slot] = evictions
            return start * self.block_tokens

        def extend() -> None:
            self._extend(slot, ids[len(chain) * self.block_tokens : (len(chain) + 1) * self.block_tokens])

        size = longest_prefix([p for _, p in self._lead], chain, min(start, limit), limit, extend)
        self._remember(slot, size, evictions)
        self.asked[slot] = len(ids)
        return size * self.block_tokens

    def grown(self, slots: Ints) -> list[int]:
        """Those of ``slots`` whose hit may be longer than when it was last looked up: the block that ended it has been published since.

        That hits have become shorter is not noticed here (``refit``): one look at a name per slot, about 0.1 us.
        """
        if not self.caching:
            return []
        full, out = [p.where for _, p in self._lead if not p.window], []
        for slot, size, known in zip(slots.tolist(), self.hit[slots].tolist(), (self.todo[slots] & HIT).tolist(), strict=True):
            chain = self._chains[slot]
            if not known or (size < len(chain) and all(chain[size] in where for where in full)):
                out.append(slot)
        return out

    def refit(self, slots: Ints) -> None:
        """Shorten remembered hits of which blocks were evicted since. They never grow: the caller was told their length."""
        evictions, pools = self.evictions, [p for _, p in self._lead]
        for slot in slots[self.seen[slots] != evictions].tolist():
            size = longest_prefix(pools, self._chains[slot], 0, int(self.hit[slot]), lambda: None)
            self._remember(slot, size, evictions)

    def _remember(self, slot: int, size: int, evictions: int) -> None:
        unchanged = self.todo[slot] & HIT and self.seen[slot] == evictions and self.hit[slot] == size
        self.todo[slot] |= HIT
        self.hit[slot], self.seen[slot] = size, evictions
        if unchanged:
            return
        chain = self._chains[slot]
        for g, pool in self._lead:
            self.hits[g][slot, :size] = 0
            logical = pool.needed(size * self.block_tokens)
            self.hits[g][slot, logical] = [pool.where[chain[i]] for i in logical]

    def _extend(self, slot: int, ids: np.ndarray) -> None:
        """Append the names of the full blocks of ``ids``, which follow the chain's end."""
        chain, raw, width = self._chains[slot], np.asarray(ids, np.int32).tobytes(), 4 * self.block_tokens
        parent = chain[-1] if chain else self._roots[slot]
        for at in range(0, len(raw) - width + 1, width):
            parent = self._content.hashes(slot, len(chain), parent, raw[at : at + width])
            chain.append(parent)

    def ledger(self) -> BlockLedger:
        """Prices for the next plan."""
        self._flush()
        return BlockLedger(self)

    def apply(self, slots: Ints, upto: Ints) -> Moves:
        """Make each slot (distinct) able to hold ``upto`` tokens: pin hits, copy shared tails, allocate. Returns the block copies.

        Raises AuditFailed if it does not fit, which the ledger should have prevented.
        """
        self._flush()
        moves: list[tuple[int, int, int]] = []
        if _flagged(slots, self.todo):
            todo = self.todo[slots]
            # All pins come before the first allocation, which could evict what they counted on.
            fresh = slots[(todo & HIT) > 0]
            self.refit(fresh)
            for slot in fresh.tolist():
                self._pin_hit(slot)
            for slot in slots[(todo & COPY) > 0].tolist():
                self._copy_tail(slot, moves)
        for g, pool in enumerate(self.pools):
            short = _short(slots, upto, self.block_tokens, self.owned[g])
            if len(short):
                self._allocate_to(g, pool, slots[short], -(-upto[short] // self.block_tokens))
        if not moves:
            return Moves()
        group, src, dst = np.array(moves, np.int32).T
        return Moves(group=group.copy(), src=src.copy(), dst=dst.copy())

    def _pin_hit(self, slot: int) -> None:
        size = int(self.hit[slot])
        for g, pool in self._lead:
            row = self.hits[g][slot, :size]
            pool.hold(row[row > 0].tolist())
            self.tables[g][slot, :size] = row
            self.owned[g][slot] = size
        self.lengths[slot] = size * self.block_tokens
        self.sealed[slot] = size
        self.todo[slot] &= ~np.uint8(HIT)
        self._queries += int(self.asked[slot])
        self._hit_tokens += size * self.block_tokens

    def shared_tails(self, slot: int) -> Iterator[tuple[int, Pool]]:
        """Pools in which the slot's next write would change a block that others hold or can find."""
        tail, inside = divmod(int(self.lengths[slot]), self.block_tokens)
        if not inside:
            return
        for g, pool in self._lead:
            block = int(self.tables[g][slot, tail])
            if block and (pool.refs[block] > 1 or block in pool.keys):
                yield g, pool

    def _copy_tail(self, slot: int, moves: list[tuple[int, int, int]]) -> None:
        tail = int(self.lengths[slot]) // self.block_tokens
        for g, pool in self.shared_tails(slot):
            src, (dst,) = int(self.tables[g][slot, tail]), pool.take(1)
            self.tables[g][slot, tail] = dst
            moves.append((g, src, dst))
            # Kept until the copy has been submitted; and each sharer in this plan sees the same count, as the ledger did.
            self._limbo.append((pool, src))
        self.todo[slot] &= ~np.uint8(COPY)
        self._renew()

    def _flush(self) -> None:
        for pool, block in self._limbo:
            pool.release((block,))
        self._limbo.clear()

    def _allocate_to(self, g: int, pool: Pool, slots: Ints, want: Ints) -> None:
        n = _lacking(slots, want, self.owned[g])
        if n < 0:
            raise AuditFailed(f"slots {slots.tolist()} are not distinct: one slot would lose the blocks another row got")
        if want.max() > self._blocks:
            raise AuditFailed(f"slots {slots[want > self._blocks].tolist()} grow past max_len")
        _give(slots, want, self.owned[g], self.tables[g], np.array(pool.take(n), np.int32))
        self._renew()

    def commit(self, slots: Ints, computed: Ints, ids: Callable[[int, int, int], np.ndarray]) -> None:
        """``computed`` tokens of each slot are accepted and written in all layers: publish full blocks, free what left the window.

        ``ids(slot, a, b)`` returns the slot's token ids a .. b-1; called only when a block became full.
        """
        self.lengths[slots] = computed
        if self.caching:
            full = computed // self.block_tokens
            for i in np.flatnonzero(full > self.sealed[slots]).tolist():
                self._publish(int(slots[i]), int(full[i]), ids)
        for g, pool in self._lead:
            if pool.window:
                first = (computed - pool.window + 1) // self.block_tokens
                for i in np.flatnonzero(first > self.gone[g][slots]).tolist():
                    self._leave_window(g, pool, int(slots[i]), int(first[i]))

    def _publish(self, slot: int, full: int, ids: Callable[[int, int, int], np.ndarray]) -> None:
        chain, done = self._chains[slot], int(self.sealed[slot])
        if len(chain) < full:
            self._extend(slot, ids(slot, len(chain) * self.block_tokens, full * self.block_tokens))
        for g, pool in self._lead:
            for i, block in enumerate(self.tables[g][slot, done:full].tolist(), done):
                self._published += block > 0 and pool.publish(block, chain[i])
        self.sealed[slot] = full
        self._renew()

    def _leave_window(self, g: int, pool: Pool, slot: int, first: int) -> None:
        row = self.tables[g][slot, self.gone[g][slot] : first]
        # Oldest first: a later hit needs the newest blocks of the window, and is lost with the first of them.
        pool.release(row[row > 0].tolist())
        row[:] = 0
        self.gone[g][slot] = first

    def truncate(self, slot: int, n: int) -> None:
        """Keep ``n`` tokens: blocks past them are freed and their names forgotten by the slot.

        A window group may lack what a shorter sequence reads; then all is dropped and ``lengths[slot]`` is 0 (recompute).
        """
        del self._chains[slot][n // self.block_tokens :]
        self.todo[slot] &= ~np.uint8(HIT)
        if n < self.lengths[slot]:
            if not n or not self._holds(slot, n):
                self.drop(slot)
                return
            self.lengths[slot] = n
            if self.sealed[slot] != _NEVER:
                self.sealed[slot] = min(int(self.sealed[slot]), n // self.block_tokens)
            if n % self.block_tokens:
                self.todo[slot] |= COPY
        for g, pool in enumerate(self.pools):
            self._shrink(g, pool, slot, -(-n // self.block_tokens))

    def trim(self, slots: Ints) -> None:
        """Free the blocks past each slot's committed tokens: what rejected drafts leave. Their names were never published."""
        keep = -(-self.lengths[slots] // self.block_tokens)
        for g, pool in self._lead:
            for i in np.flatnonzero(self.owned[g][slots] > keep).tolist():
                self._shrink(g, pool, int(slots[i]), int(keep[i]))

    def _shrink(self, g: int, pool: Pool, slot: int, keep: int) -> None:
        if self.owned[g][slot] > keep:
            row = self.tables[g][slot, keep : self.owned[g][slot]]
            # Last block first, so that tails are evicted before the heads they hang on.
            pool.release(row[row > 0][::-1].tolist())
            row[:] = 0
            self.owned[g][slot] = keep

    def _holds(self, slot: int, n: int) -> bool:
        """Whether the slot still has every block that a sequence of its first ``n`` tokens reads."""
        return all((self.tables[g][slot, pool.needed(n)] > 0).all() for g, pool in self._lead)

    def drop(self, slot: int) -> None:
        """Release all blocks of the slot (eviction). Its chain stays, so that re-admission can match without hashing again."""
        for g, pool in enumerate(self.pools):
            self._shrink(g, pool, slot, 0)
            self.gone[g][slot] = pool.sinks
        self.lengths[slot] = self.sealed[slot] = self.hit[slot] = self.todo[slot] = 0

    def fork(self, src: int, dst: int, n: int) -> None:
        """The opened, empty slot ``dst`` shares the blocks of the first ``n`` tokens of ``src``; the first writer of a shared tail copies.

        ``lengths[dst]`` is ``n``, or 0 if the window of ``src`` has moved past what ``n`` tokens read.
        """
        if n > self.lengths[src] or any(owned[dst] for owned in self.owned):
            raise AuditFailed(f"slot {dst} cannot share {n} tokens of slot {src}, which has {self.lengths[src]}")
        self.todo[dst] = 0
        if self._roots[dst] == self._roots[src]:
            self._chains[dst][:] = self._chains[src][: n // self.block_tokens]
        if not self._holds(src, n):
            return
        keep = -(-n // self.block_tokens)
        for g, pool in self._lead:
            row = self.tables[g][src, :keep]
            pool.hold(row[row > 0].tolist())
            self.tables[g][dst, :keep] = row
            self.owned[g][dst], self.gone[g][dst] = keep, min(int(self.gone[g][src]), max(keep, pool.sinks))
        self.lengths[dst] = n
        self.sealed[dst] = _NEVER if self.sealed[src] == _NEVER else n // self.block_tokens
        if n % self.block_tokens:
            self.todo[[src, dst]] |= COPY

    def close(self, slot: int) -> None:
        """The request left: release everything and forget its chain."""
        self.drop(slot)
        self._roots.pop(slot, None)
        self._chains.pop(slot, None)

    def reset(self) -> None:
        """Forget all names (new weights). What running slots hold was made by the old weights, so it is never published."""
        for pool in self.pools:
            pool.forget()
        self._published += 1
        self._renew()
        self.hit[:] = 0
        # By `owned`, not `lengths`: a first chunk may be in flight.
        for owned in self.owned:
            self.sealed[owned > 0] = _NEVER

    def pin(self, group: int, blocks: Iterable[int]) -> None:
        """One more reference to each block, so that it outlives its slot (shipping): full ones, or any of a slot that no longer writes."""
        held = list(blocks)
        self.pools[group].hold(held)
        self.pools[group].pins[held] += 1

    def unpin(self, group: int, blocks: Iterable[int]) -> None:
        """Undo ``pin``."""
        held = list(blocks)
        self.pools[group].pins[held] -= 1
        self.pools[group].release(held)

    def usage(self) -> dict[str, float]:
        """Sums over pools in blocks (used + cached + free = total), their used share, and tokens asked for and found by admissions."""
        total = sum(p.total for p in self.pools)
        cached = sum(len(p.cached) for p in self.pools)
        free = sum(p.free for p in self.pools) - cached
        used = total - cached - free
        return {
            "kv_cache_usage": used / total,
            "used": used,
            "cached": cached,
            "free": free,
            "total": total,
            "queries": self._queries,
            "hits": self._hit_tokens,
        }

    def audit(self, live: Ints) -> None:
        """Raise AuditFailed if references, names, free lists and tables disagree, or a slot that is not ``live`` owns blocks."""
        self._flush()
        for g, pool in enumerate(self.pools):
            audit(pool, f"group {g}", self.tables[g], self.owned[g], live)


def block_managers(
    config: EngineConfig, geometries: Sequence[KVGeometry], max_model_len: int, content: Content | None = None
) -> list[BlockManager]:  # fmt: skip
    """One per lane, lane 0 first, as a configuration wants them. ``content`` names the blocks of lane 0; hashes name all others."""
    return [
        BlockManager(
            geometry,
            max_len=max_model_len + 1,
            prefix_caching=config.cache.enable_prefix_caching,
            content=content if lane == 0 else None,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        )
        for lane, geometry in enumerate(geometries)
    ]
