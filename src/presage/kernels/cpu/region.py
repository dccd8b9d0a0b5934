"""What a kernel may ask inside a parallel region: its rank, the next piece of work, a barrier.

Every kernel gets the address of a table of int64. The first `HEADER` words (one cache line) belong to this module, the
kernel's own parameters start at word `HEADER`. Each of the `size` threads of a region calls `enter` exactly once.

    rank = enter(table)                 # 0 .. size-1, a different one in each thread
    item = claim(table)                 # dynamic split: every item is handed out once
    while item < items:
        ...
        item = claim(table)
    leave(table)                        # needed after `claim`: the last thread out rewinds the counter

Counters only ever count whole rounds, so nothing has to be reset between calls. Which thread does an item is not
determined; what is computed for it must not depend on that.
"""

from __future__ import annotations

from presage.kernels.cpu.cache import device
from presage.kernels.cpu.simd import atomic_add, atomic_load, atomic_store, get_i64, pause

HEADER = 8
_TICKET, _ARRIVED, _CLAIMED, _LEFT, SIZE = 0, 1, 2, 3, 4


@device
def team_size(table):  # type: ignore[no-untyped-def]
    """How many threads run this region."""
    return get_i64(table, SIZE)


@device
def enter(table):  # type: ignore[no-untyped-def]
    """This thread's rank in 0 .. size-1; to be called once by every thread."""
    return atomic_add(table, _TICKET, 1) % get_i64(table, SIZE)


@device
def claim(table):  # type: ignore[no-untyped-def]
    """The next unclaimed item number, counting from 0."""
    return atomic_add(table, _CLAIMED, 1)


@device
def leave(table):  # type: ignore[no-untyped-def]
    """After the last `claim` of a region."""
    if (atomic_add(table, _LEFT, 1) + 1) % get_i64(table, SIZE) == 0:
        atomic_store(table, _CLAIMED, 0)


@device
def barrier(table):  # type: ignore[no-untyped-def]
    """Wait until all threads of the region are here; what they wrote before is visible after. Spins."""
    size = get_i64(table, SIZE)
    target = (atomic_add(table, _ARRIVED, 1) // size + 1) * size
    while atomic_load(table, _ARRIVED) < target:
        pause()


@device
def share(items, rank, size):  # type: ignore[no-untyped-def]
    """Static split: the half-open range of `items` that belongs to `rank`, sizes differing by at most one."""
    base, extra = items // size, items % size
    start = rank * base + min(rank, extra)
    stop = start + base + (1 if rank < extra else 0)
    return start, stop
