"""Copies inside a paged cache: whole blocks (copy-on-write, forks) and single slots (the accepted path of a tree), over all layers at once.

Pairs are done in the order given, each thread owning whole (layer, tensor) or (layer, head) shares, so a list may overlap itself:
an accepted path that moves down (src >= dst, ascending) never overwrites a source it still needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.attention import cache_geometry, token_bytes
from presage.kernels.cpu.cache import device, kernel
from presage.kernels.cpu.region import HEADER, enter, share, team_size
from presage.kernels.cpu.simd import get_i32, get_i64, get_u16, load_i32, set_i32, store_i32
from presage.kernels.cpu.simd_attention import BF16, HEAD, INT8, set_u16
from presage.kernels.cpu.team import Team
from presage.kernels.reference.kv_copy import gather_kv

__all__ = ["CacheCopies", "copy_blocks", "gather_kv", "move_slots"]

BLOCK = 32
_CACHES, _LAYERS, _HEADS, _DIM, _KIND, _SRC, _DST, _COUNT = range(HEADER, HEADER + 8)
_token_bytes = device(token_bytes)


@kernel
def _copy_blocks():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank, caches = enter(table), get_i64(table, _CACHES)
        words = get_i64(table, _HEADS) * BLOCK * _token_bytes(get_i64(table, _KIND), get_i64(table, _DIM)) // 4
        start, stop = share(2 * get_i64(table, _LAYERS), rank, team_size(table))
        for item in range(start, stop):
            base = get_i64(caches, item)
            for i in range(get_i64(table, _COUNT)):
                source, target = get_i64(get_i64(table, _SRC), i) * words, get_i64(get_i64(table, _DST), i) * words
                for w in range(0, words, 16):
                    store_i32(base, target + w, load_i32(base, source + w))

    return run


@device
def _move(keys, values, source, target, head, heads, dim, kind):  # type: ignore[no-untyped-def]
    """One token of one head, in 4-byte words: a key lies 32 words apart, a value in one piece (bf16: alternating with another)."""
    size, words, s, t = BLOCK * _token_bytes(kind, dim), dim >> kind, source % BLOCK, target % BLOCK
    a, b = (source // BLOCK * heads + head) * size, (target // BLOCK * heads + head) * size
    k, k_to, v, v_to = keys + a, keys + b, values + a, values + b
    if kind == INT8:
        set_i32(k_to, t, get_i32(k, s))
        set_i32(v_to, t, get_i32(v, s))
        k, k_to, v, v_to = k + HEAD, k_to + HEAD, v + HEAD, v_to + HEAD
    for i in range(words):
        set_i32(k_to, i * BLOCK + t, get_i32(k, i * BLOCK + s))
    if kind == BF16:
        for d in range(dim):
            set_u16(v_to, (t // 2 * dim + d) * 2 + 1 - t % 2, get_u16(v, (s // 2 * dim + d) * 2 + 1 - s % 2))
        return
    for i in range(words):
        set_i32(v_to, t * words + i, get_i32(v, s * words + i))


@kernel
def _move_slots():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank, caches, heads = enter(table), get_i64(table, _CACHES), get_i64(table, _HEADS)
        dim, kind, count = get_i64(table, _DIM), get_i64(table, _KIND), get_i64(table, _COUNT)
        start, stop = share(get_i64(table, _LAYERS) * heads, rank, team_size(table))
        for item in range(start, stop):
            layer, head = item // heads, item % heads
            keys, values = get_i64(caches, 2 * layer), get_i64(caches, 2 * layer + 1)
            for i in range(count):
                source, target = get_i64(get_i64(table, _SRC), i), get_i64(get_i64(table, _DST), i)
                if source != target:
                    _move(keys, values, source, target, head, heads, dim, kind)

    return run


class CacheCopies:
    """Copies over the (K, V) tensors of the layers of one group, all of one shape and type. Raises ConfigError otherwise."""

    def __init__(self, team: Team, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if not caches:
            raise ConfigError("copies need at least one layer's cache")
        keys, first = caches[0]
        heads, dim, kind = cache_geometry(keys, first)
        for k, v in caches:
            if cache_geometry(k, v) != (heads, dim, kind) or v.shape != first.shape:
                raise ConfigError(f"caches of one group differ: {v.dtype} {tuple(v.shape)} beside {first.dtype} {tuple(first.shape)}")
        self.team, self._alive = team, list(caches)
        self._addresses = torch.tensor([tensor.data_ptr() for pair in caches for tensor in pair])
        self._words = (self._addresses.data_ptr(), len(caches), heads, dim, kind)
        self._token_bytes = 2 * len(caches) * heads * token_bytes(kind, dim)
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
