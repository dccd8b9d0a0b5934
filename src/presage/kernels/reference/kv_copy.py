"""Plain-torch twins of the cache's copies, and reading and writing slots in whatever layout a cache has (see `kernels.cpu.attention`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 32
SCALES = 4 * BLOCK
"""Bytes before the codes of an int8 block of one head: the scales of its tokens."""
LEAST = 1e-30
"""An int8 row whose largest magnitude is below this becomes zero."""
Cache = tuple[torch.Tensor, torch.Tensor]


def cache_shapes(num_blocks: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the K and V tensors of one layer for ``num_blocks`` blocks of 32 tokens."""
    if dtype == torch.int8:
        return ((num_blocks, kv_heads, SCALES + BLOCK * dim),) * 2
    if dtype == torch.bfloat16:
        return (num_blocks, kv_heads, dim // 2, BLOCK, 2), (num_blocks, kv_heads, BLOCK // 2, dim, 2)
    return (num_blocks, kv_heads, dim, BLOCK), (num_blocks, kv_heads, BLOCK, dim)


def keys_by_token(k_cache: torch.Tensor) -> torch.Tensor:
    """A view [num_blocks, 32, Hkv, D] (f32), [num_blocks, 32, Hkv, D/2, 2] (bf16) or [num_blocks, 32, Hkv, D/4, 4] (int8 codes) of a K cache."""
    if k_cache.dtype == torch.int8:
        k_cache = k_cache[..., SCALES:].unflatten(-1, (-1, BLOCK, 4))
    return k_cache.permute(0, 3, 1, 2, 4) if k_cache.dim() == 5 else k_cache.permute(0, 3, 1, 2)


def values_by_token(v_cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A view of a V cache and the index of ``slots`` in it, which picks [n, Hkv, D]."""
    block, offset = slots // BLOCK, slots % BLOCK
    if v_cache.dtype == torch.int8:
        return v_cache[..., SCALES:].unflatten(-1, (BLOCK, -1)).permute(0, 2, 1, 3), (block, offset)
    if v_cache.dtype == torch.bfloat16:
        return v_cache.permute(0, 2, 4, 1, 3), (block, offset // 2, 1 - offset % 2)
    return v_cache.permute(0, 2, 1, 3), (block, offset)


def scales_by_token(cache: torch.Tensor) -> torch.Tensor:
    """A view f32 [num_blocks, 32, Hkv] of the scales of an int8 cache."""
    return cache[..., :SCALES].view(torch.float32).permute(0, 2, 1)


def heads_of(v_cache: torch.Tensor) -> tuple[int, int]:
    """(KV heads, D) of a V cache."""
    return v_cache.shape[1], (v_cache.shape[2] - SCALES) // BLOCK if v_cache.dtype == torch.int8 else v_cache.shape[3]


def quantise_kv(x: torch.Tensor, empty: float = 0.0) -> Cache:
    """Rows [..., D] f32 as int8 codes and f32 scales [...]: the largest magnitude becomes 127, halves go to even. A row below LEAST becomes
    zeros with the scale ``empty``; a NaN makes its row's scale NaN and its code 0."""
    limit = x.abs().amax(-1)
    zero = limit < LEAST
    factor = torch.where(limit >= LEAST, 127.0 / limit, 0.0)
    codes = (x * factor[..., None]).nan_to_num(0.0).round().clamp(-128, 127).to(torch.int8)
    return codes, torch.where(zero, empty, limit / 127.0)


def gather_stored(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is stored at ``slots`` (block * 32 + offset): k and v [n, Hkv, D] in the cache's type; int8 caches give the scales [n, Hkv] too."""
    block, offset = slots // BLOCK, slots % BLOCK
    view, index = values_by_token(v_cache, slots)
    v = view[index]
    k = keys_by_token(k_cache)[block, offset].reshape(v.shape)
    if v_cache.dtype != torch.int8:
        return k, v
    return k ^ -128, v, scales_by_token(k_cache)[block, offset], scales_by_token(v_cache)[block, offset]


def gather_kv(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> Cache:
    """Keys and values [n, Hkv, D] at ``slots``, in the cache's type, int8 as the f32 they stand for."""
    k, v, *scales = gather_stored(k_cache, v_cache, slots)
    return (k * scales[0][..., None], v * scales[1][..., None]) if scales else (k, v)


def scatter_stored(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *scales: torch.Tensor
) -> None:
    """Write what `gather_stored` gives at ``slots``."""
    block, offset = slots // BLOCK, slots % BLOCK
    keys, (values, index) = keys_by_token(k_cache), values_by_token(v_cache, slots)
    keys[block, offset] = (k ^ -128 if scales else k).reshape(-1, *keys.shape[2:])
    values[index] = v
    for cache, scale in zip((k_cache, v_cache), scales, strict=False):
        scales_by_token(cache)[block, offset] = scale


def scatter_kv(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write k, v [n, Hkv, D] at ``slots`` in the cache's type; slot -1 is not written."""
    keep = slots >= 0
    k, v = k[keep], v[keep]
    if v_cache.dtype != torch.int8:
        scatter_stored(k_cache, v_cache, slots[keep], k.to(k_cache.dtype), v.to(v_cache.dtype))
        return
    (k, k_scale), (v, v_scale) = quantise_kv(k.float()), quantise_kv(v.float())
    scatter_stored(k_cache, v_cache, slots[keep], k, v, k_scale, v_scale)


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
            scatter_stored(k_cache, v_cache, dst[i : i + 1], *gather_stored(k_cache, v_cache, src[i : i + 1]))
