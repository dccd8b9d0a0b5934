"""Plain-torch twins of the cache's copies, and reading and writing slots in whatever layout a cache has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 32
Cache = tuple[torch.Tensor, torch.Tensor]


def keys_by_token(k_cache: torch.Tensor) -> torch.Tensor:
    """A view [num_blocks, 32, Hkv, D] (f32) or [num_blocks, 32, Hkv, D/2, 2] (bf16) of a K cache."""
    return k_cache.permute(0, 3, 1, 2, 4) if k_cache.dim() == 5 else k_cache.permute(0, 3, 1, 2)


def gather_kv(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> Cache:
    """Stored keys and values [n, Hkv, D] at ``slots`` (block * 32 + offset), in the cache's type."""
    block, offset = slots // BLOCK, slots % BLOCK
    k, v = keys_by_token(k_cache)[block, offset], v_cache[block, :, offset]
    return k.reshape(v.shape), v


def scatter_kv(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write k, v [n, Hkv, D] at ``slots``; slot -1 is not written."""
    keep = slots >= 0
    block, offset = slots[keep] // BLOCK, slots[keep] % BLOCK
    view = keys_by_token(k_cache)
    view[block, offset] = k[keep].to(k_cache.dtype).reshape(-1, *view.shape[2:])
    v_cache[block, :, offset] = v[keep].to(v_cache.dtype)


def copy_blocks(caches: Sequence[Cache], src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole blocks in every layer, pair after pair."""
    for cache in caches:
        for tensor in cache:
            for s, d in zip(src.tolist(), dst.tolist(), strict=True):
                tensor[d] = tensor[s]


def move_slots(caches: Sequence[Cache], src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy single tokens in every layer, pair after pair: an ascending accepted path moves down safely."""
    for k_cache, v_cache in caches:
        for i in range(len(src)):
            scatter_kv(k_cache, v_cache, dst[i : i + 1], *gather_kv(k_cache, v_cache, src[i : i + 1]))
