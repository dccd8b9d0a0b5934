"""Microseconds of the block manager's calls in a decode loop: nothing to do, the usual share of rows crossing a block, all of them.

python -m benchmarks.cache
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

from presage.cache.manager import BlockManager
from presage.core.kv import BLOCK_TOKENS, KVGeometry, KVGroup
from presage.core.request import Request

GROUPS = {"full": (0,), "full+window": (0, 256)}


def manager(windows: tuple[int, ...], rows: int) -> tuple[BlockManager, np.ndarray]:
    """A manager with ``rows`` slots of 512 committed tokens, all different."""
    groups = tuple(KVGroup(layers=((0, 0),), heads=1, head_dim=1, block_bytes=1, window=w) for w in windows)
    kv = BlockManager(KVGeometry(groups=groups, num_blocks=(rows * 40 + 2,) * len(groups)), rows, max_len=1024)
    slots = np.arange(rows, dtype=np.int32)
    for s in range(rows):
        kv.open(s, Request(id=str(s), prompt=np.zeros(1, np.int32), salt=str(s).encode()))
    step(kv, slots, np.full(rows, 512, np.int32))
    return kv, slots


def ids(slot: int, a: int, b: int) -> np.ndarray:
    """Token ids of a slot; their values do not matter here."""
    return np.arange(a, b, dtype=np.int32)


def step(kv: BlockManager, slots: np.ndarray, length: np.ndarray) -> tuple[float, float]:
    """Grow ``slots`` to ``length`` tokens; microseconds of apply and commit."""
    t0 = perf_counter()
    kv.apply(slots, length)
    t1 = perf_counter()
    kv.commit(slots, length, ids)
    return (t1 - t0) * 1e6, (perf_counter() - t1) * 1e6


def best(run: Callable[[], object], times: int = 400) -> float:
    """Median microseconds of a call that changes nothing."""
    spent = []
    for _ in range(times):
        t0 = perf_counter()
        run()
        spent.append((perf_counter() - t0) * 1e6)
    return float(np.median(spent))


def decode(windows: tuple[int, ...], rows: int) -> None:
    """One line per batch size: idle calls, then 64 decode steps with staggered rows, then a step in which every row crosses."""
    kv, slots = manager(windows, rows)
    length = (512 + np.arange(rows) % BLOCK_TOKENS).astype(np.int32)
    step(kv, slots, length)
    idle = best(lambda: kv.apply(slots, length)), best(lambda: kv.commit(slots, length, ids))
    need = best(lambda: kv.ledger().need(slots, length))
    spent = [step(kv, slots, length + i) for i in range(1, 2 * BLOCK_TOKENS + 1)]
    usual = np.median(np.array(spent), axis=0)
    step(kv, slots, np.full(rows, 640, np.int32))
    alloc = step(kv, slots, np.full(rows, 641, np.int32))[0]
    full = step(kv, slots, np.full(rows, 672, np.int32))[1]
    print(
        f"{rows:5d} | {idle[0]:6.1f} {usual[0]:6.1f} {alloc:7.1f} ({(alloc - idle[0]) / rows / len(windows):4.2f}/block) | "
        f"{idle[1]:6.1f} {usual[1]:6.1f} {full:7.1f} ({(full - idle[1]) / rows / len(windows):4.2f}/block) | {need:6.1f}"
    )


def waiting(rows: int, blocks: int) -> None:
    """Queued slots with a remembered hit of ``blocks`` blocks: looking again and pricing them all."""
    kv, _ = manager((0,), 1)
    tokens = np.zeros(blocks * BLOCK_TOKENS + 1, np.int32)
    for s in range(1, rows + 2):
        kv.open(s, Request(id=str(s), prompt=tokens))
    kv.apply(np.array([1], np.int32), np.array([len(tokens)], np.int32))
    kv.commit(np.array([1], np.int32), np.array([len(tokens)], np.int32), lambda s, a, b: tokens[a:b])
    slots = np.arange(2, rows + 2, dtype=np.int32)
    t0 = perf_counter()
    for s in slots.tolist():
        kv.match(s, tokens)
    first = (perf_counter() - t0) * 1e6 / rows
    again = best(lambda: [kv.match(s, tokens) for s in slots.tolist()], 50) / rows
    ledger = kv.ledger()
    price = best(lambda: ledger.need(slots, np.full(rows, len(tokens), np.int32)), 50)
    print(f"{rows} queued, {blocks} blocks: match {first:.1f} each (hash included), again {again:.1f} each; need {price:.1f} for all")


def main() -> None:
    """Print the tables (microseconds, medians)."""
    for name, windows in GROUPS.items():
        print(f"{name}: rows | apply idle, usual, all rows | commit idle, usual, all rows | ledger+need")
        for rows in (1, 64, 256):
            decode(windows, rows)
    for blocks in (4, 16):
        waiting(128, blocks)


if __name__ == "__main__":
    main()
