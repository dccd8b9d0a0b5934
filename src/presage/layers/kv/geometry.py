"""KV groups of a model under the plain method, from its sizes alone: no torch, so the simulator budgets the same bytes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from presage.core.kv import BLOCK_TOKENS, KVGroup

if TYPE_CHECKING:
    from presage.models.params import Params

DTYPE_BYTES = {"bfloat16": (2, 0), "float32": (4, 0), "int8": (1, 4)}
"""Bytes of a number, and those that each key or value of one head needs beside them (an int8 one has a float32 scale)."""


def stored_dtype(kv_cache_dtype: str, dtype: str) -> str:
    """The type of stored keys and values: the model's ``dtype`` unless ``CacheConfig.kv_cache_dtype`` names another."""
    return dtype if kv_cache_dtype == "auto" else kv_cache_dtype


def kv_groups(params: Params, dtype: str, block_size: int = BLOCK_TOKENS, salt: bytes = b"") -> tuple[KVGroup, ...]:
    """Layers with equal windows form one group, in the order of their first layer. ``dtype``: "bfloat16", "float32" or "int8", as stored.

    ``salt`` tells apart weights that the configuration cannot (a checkpoint's revision).
    """
    number, scale = DTYPE_BYTES[dtype]
    print_ = hashlib.sha256(b"plain|" + params.fingerprint + salt + dtype.encode()).digest()[:16]
    groups = []
    for window in dict.fromkeys(params.windows):
        layers = [i for i, w in enumerate(params.windows) if w == window]
        groups.append(
            KVGroup(
                layers=tuple((layer, slot) for slot, layer in enumerate(layers)),
                heads=params.kv_heads,
                head_dim=params.head_dim,
                block_bytes=len(layers) * 2 * params.kv_heads * (params.head_dim * number + scale) * block_size,
                block_tokens=block_size,
                window=window,
                fingerprint=print_,
            )
        )
    return tuple(groups)
