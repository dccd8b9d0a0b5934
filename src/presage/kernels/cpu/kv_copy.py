"""Copies inside a paged cache: whole blocks (copy-on-write, forks) and single slots (the accepted path of a tree), over all layers at once.

Pairs are done in the order given, each thread owning whole (layer, tensor) or (layer, head) shares, so a list may overlap itself:
an accepted path that moves down (src >= dst, ascending) never overwrites a source it still needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.attention import cache_geometry
from presage.kernels.cpu.cache import device, kernel
from presage.kernels.cpu.region import HEADER, enter, share, team_size
from presage.kernels.cpu.simd import get_i32, get_i64, load_i32, set_i32, store_i32
from presage.kernels.cpu.team import Team
from presage.kernels.reference.kv_copy import gather_kv

__all__ = ["CacheCopies", "copy_blocks", "gather_kv", "move_slots"]

BLOCK = 32
_CACHES, _LAYERS, _HEADS, _DIM, _HALF, _SRC, _DST, _COUNT = range(HEADER, HEADER + 8)


@kernel
def _copy_blocks():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank, caches = enter(table), get_i64(table, _CACHES)
        words = get_i64(table, _HEADS) * BLOCK * get_i64(table, _DIM) // (2 if get_i64(table, _HALF) else 1)
        start, stop = share(2 * get_i64(table, _LAYERS), rank, team_size(table))
        for item in range(start, stop):
            base = get_i64(caches, item)
            for i in range(get_i64(table, _COUNT)):
                source, target = get_i64(get_i64(table, _SRC), i) * words, get_i64(get_i64(table, _DST), i) * words
                for w in range(0, words, 16):
                    store_i32(base, target + w, load_i32(base, source + w))

    return run


@device
def _move(keys, values, source, target, head, heads, dim, half):  # type: ignore[no-untyped-def]
    """One token of one head, in 4-byte words: a key lies 32 words apart, a value in one piece."""
    words = dim // 2 if half else dim
    a, b = (source // BLOCK * heads + head) * words * BLOCK, (target // BLOCK * heads + head) * words * BLOCK
    s, t = source % BLOCK, target % BLOCK
    for i in range(words):
        set_i32(keys, b + i * BLOCK + t, get_i32(keys, a + i * BLOCK + s))
    for i in range(words):
        set_i32(values, b + t * words + i, get_i32(values, a + s * words + i))


@kernel
def _move_slots():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank, caches, heads = enter(table), get_i64(table, _CACHES), get_i64(table, _HEADS)
        dim, half, count = get_i64(table, _DIM), get_i64(table, _HALF), get_i64(table, _COUNT)
        start, stop = share(get_i64(table, _LAYERS) * heads, rank, team_size(table))
        for item in range(start, stop):
            layer, head = item // heads, item % heads
            keys, values = get_i64(caches, 2 * layer), get_i64(caches, 2 * layer + 1)
            for i in range(count):
                source, target = get_i64(get_i64(table, _SRC), i), get_i64(get_i64(table, _DST), i)
                if source != target:
                    _move(keys, values, source, target, head, heads, dim, half)

    return run


class CacheCopies:
    """Copies over the (K, V) tensors of the layers of one group, all of one shape and type. Raises ConfigError otherwise."""

    def __init__(self, team: Team, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if not caches:
            raise ConfigError("copies need at least one layer's cache")
        keys, first = caches[0]
        heads, dim, half = cache_geometry(keys, first)
        for k, v in caches:
            if cache_geometry(k, v) != (heads, dim, half) or v.shape != first.shape:
                raise ConfigError(f"caches of one group differ: {v.dtype} {tuple(v.shape)} beside {first.dtype} {tuple(first.shape)}")
        self.team, self._alive = team, list(caches)
        self._addresses = torch.tensor([tensor.data_ptr() for pair in caches for tensor in pair])
        self._words = (self._addresses.data_ptr(), len(caches), heads, dim, half)
        self._token_bytes = 2 * len(caches) * heads * dim * first.element_size()
        self._table, self._blocks, self._slots = team.table(8), _copy_blocks(), _move_slots()

    def copy_blocks(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Blocks (of 32 tokens) ``dst[i]`` become ``src[i]``, in order."""
        src, dst = src.long().contiguous(), dst.long().contiguous()
        table = self._table.set(*self._words, src.data_ptr(), dst.data_ptr(), _same_length(src, dst))
        self.team.run(self._blocks, table, 2 * BLOCK * self._token_bytes * src.numel())

    def move_slots(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Slots ``dst[i]`` become ``src[i]``, in order."""
        src, dst = src.long().contiguous(), dst.long().contiguous()
        table = self._table.set(*self._words, src.data_ptr(), dst.data_ptr(), _same_length(src, dst))
        self.team.run(self._slots, table, 2 * self._token_bytes * src.numel())


def _same_length(src: torch.Tensor, dst: torch.Tensor) -> int:
    if src.numel() != dst.numel():
        raise ConfigError(f"{src.numel()} sources for {dst.numel()} targets")
    return src.numel()


def copy_blocks(team: Team, caches: Sequence[tuple[torch.Tensor, torch.Tensor]], src: torch.Tensor, dst: torch.Tensor) -> None:
    """One copy without binding, see `CacheCopies`."""
    CacheCopies(team, caches).copy_blocks(src, dst)


def move_slots(team: Team, caches: Sequence[tuple[torch.Tensor, torch.Tensor]], src: torch.Tensor, dst: torch.Tensor) -> None:
    """One move without binding, see `CacheCopies`."""
    CacheCopies(team, caches).move_slots(src, dst)
