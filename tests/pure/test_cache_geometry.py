"""Splitting memory between pools, and sizes in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presage.cache.geometry import parse_bytes, peak_blocks, size_pools
from presage.core.errors import ConfigError, NotEnoughMemory
from presage.core.kv import KVGeometry, KVGroup


def group(block_bytes: int = 100, **kw) -> KVGroup:
    return KVGroup(layers=((0, 0),), heads=1, head_dim=1, block_bytes=block_bytes, block_tokens=4, **kw)


def cost(geometry: KVGeometry) -> int:
    return sum(n * g.block_bytes for n, g in zip(geometry.num_blocks, geometry.groups, strict=True))


@pytest.mark.parametrize(
    "text, size", [("4GiB", 4 << 30), ("1.5 kib", 1536), ("500MB", 500_000_000), ("12", 12), (7, 7), ("3b", 3), ("2TiB", 2 << 40)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-4", "4 gigs", "1e9", "4G"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0, 0, 5, 40, 400])), min_size=1, max_size=3),
    memory=st.integers(0, 400_000),
    seqs=st.integers(1, 8),
    chunk=st.integers(1, 64),
    longest=st.integers(1, 300),
)
def test_pools_fill_memory_and_hold_one_sequence(sizes, memory, seqs, chunk, longest) -> None:
    groups = tuple(group(b, window=w) for b, w in sizes)
    least = [peak_blocks(g, longest, chunk) for g in groups]
    needed = sum((n + 1) * g.block_bytes for n, g in zip(least, groups, strict=True))
    if needed > memory:
        with pytest.raises(NotEnoughMemory) as failed:
            size_pools(groups, memory, seqs, chunk, longest)
        assert failed.value.details == {"needed": needed, "available": memory}
        return
    geometry = size_pools(groups, memory, seqs, chunk, longest)
    assert cost(geometry) <= memory
    assert all(n > low for n, low in zip(geometry.num_blocks, least, strict=True))
    # Whatever is left would not buy one more block in every pool.
    assert memory - cost(geometry) < sum(g.block_bytes for g in groups)


def test_windows_stop_where_more_is_useless() -> None:
    geometry = size_pools((group(), group(window=9)), 1_000_000, 4, 16, 256)
    full, window = geometry.num_blocks
    assert window - 1 == 4 * (3 + 1) + 4 and full > 9_900


def test_short_sequences_are_not_held_up_by_windows() -> None:
    full, window = size_pools((group(), group(window=400)), 100_000, 64, 16, 256).num_blocks
    assert full == window
