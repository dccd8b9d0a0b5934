"""How much memory a model needs at least, before anything is loaded."""

from __future__ import annotations

from presage.cache.geometry import peak_blocks
from presage.core.config import EngineConfig
from presage.layers.kv.geometry import kv_groups, stored_dtype
from presage.models.params import Params


def least_kv_bytes(config: EngineConfig, params: Params, dtype: str) -> int:
    """Bytes of KV cache for one sequence of the model's (or the configured) length; ``dtype`` is the model's."""
    groups = kv_groups(params, stored_dtype(config.cache.kv_cache_dtype, dtype), config.cache.block_size, b"")
    chunk = config.scheduler.max_num_batched_tokens
    return sum((peak_blocks(g, params.max_len, chunk) + 1) * g.block_bytes for g in groups)
