"""The longest cached prefix over pools with different retention rules (full and sliding-window groups)."""

from __future__ import annotations

from collections.abc import Callable

from presage.cache.pool import Pool


def longest_prefix(pools: list[Pool], chain: list[bytes], start: int, limit: int, extend: Callable[[], None]) -> int:
    """Blocks of the longest prefix (at most ``limit``) that every pool can serve.

    Full pools need each block from the first on, window pools those that a sequence of that length still reads. ``chain`` holds the
    names of the first blocks and ``extend`` appends the next one. The full pools are known to hold the first ``start`` blocks.
    """
    full = [p.where for p in pools if not p.window]
    size = start
    while size < limit:
        if size == len(chain):
            extend()
        if any(chain[size] not in where for where in full):
            break
        size += 1
    windows = [p for p in pools if p.window]
    before = -1
    # Shortening for one window can uncover a hole in another one's, so repeat until nobody objects.
    while before != size:
        before = size
        for pool in windows:
            size = _covered(pool, chain, size)
    return size


def _covered(pool: Pool, chain: list[bytes], size: int) -> int:
    """Longest prefix of at most ``size`` blocks whose window (and sinks) the pool holds."""
    while size:
        needed = pool.needed(size * pool.group.block_tokens)
        hole = next((i for i in needed if chain[i] not in pool.where), None)
        if hole is None:
            return size
        size = hole
    return 0
