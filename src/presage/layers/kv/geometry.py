"""KV groups of a model under the plain method, from its sizes alone: no torch, so the simulator budgets the same bytes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from presage.core.kv import BLOCK_TOKENS, KVGroup

if TYPE_CHECKING:
    from presage.models.params import Params

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def kv_groups(params: Params, dtype: str, block_size: int = BLOCK_TOKENS, salt: bytes = b"") -> tuple[KVGroup, ...]:
    """Layers with equal windows form one group, in the order of their first layer. ``dtype``: "bfloat16" or "float32".

    ``salt`` tells apart weights that the configuration cannot (a checkpoint's revision).
    """
    byte = DTYPE_BYTES[dtype]
    print_ = hashlib.sha256(b"plain|" + params.fingerprint + salt + dtype.encode()).digest()[:16]
    groups = []
    for window in dict.fromkeys(params.windows):
        layers = [i for i, w in enumerate(params.windows) if w == window]
        groups.append(
            KVGroup(
                layers=tuple((layer, slot) for slot, layer in enumerate(layers)),
                heads=params.kv_heads,
                head_dim=params.head_dim,
                block_bytes=len(layers) * 2 * params.kv_heads * params.head_dim * byte * block_size,
                block_tokens=block_size,
                window=window,
                fingerprint=print_,
            )
        )
    return tuple(groups)
