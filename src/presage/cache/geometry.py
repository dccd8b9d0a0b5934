"""How device memory is split between the pools, and byte sizes as people write them."""

from __future__ import annotations

import re

from presage.core.errors import ConfigError, NotEnoughMemory
from presage.core.kv import KVGeometry, KVGroup

_UNITS = {"": 1, "b": 1} | {f"{p}{i}b": (1024 if i else 1000) ** (n + 1) for n, p in enumerate("kmgt") for i in ("", "i")}


def parse_bytes(text: str | int) -> int:
    """Bytes of "4GiB" (binary), "500MB" (decimal) or a plain number. Raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a size in bytes; write for example 4GiB, 500MB or 1048576")
    return int(float(found[1]) * _UNITS[found[2]]) if "." in found[1] else int(found[1]) * _UNITS[found[2]]


def peak_blocks(group: KVGroup, tokens: int, chunk: int) -> int:
    """Most blocks a sequence holds at once while it grows to ``tokens`` tokens in chunks of at most ``chunk``."""
    whole = group.blocks(tokens)
    if not group.window or group.lane:
        return whole
    # m consecutive tokens touch at most (m - 2) // block_tokens + 2 blocks (m >= 2), wherever they begin.
    reach = max(2, group.window - 1 + min(chunk, tokens))
    return min(whole, (reach - 2) // group.block_tokens + 2 + group.blocks(group.sinks))


def size_pools(groups: tuple[KVGroup, ...], bytes: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> KVGeometry:
    """Blocks per pool within ``bytes`` of memory. Raises NotEnoughMemory if one sequence of ``max_model_len`` tokens does not fit.

    All pools get equally many blocks, for short sequences use as many in window groups as in full ones; but a window pool stops at
    what ``max_num_seqs`` windows and one step's chunk can use, and what it leaves goes to the full groups.
    """
    least = [peak_blocks(g, max_model_len, max_num_batched_tokens) for g in groups]
    most = _useful(groups, max_num_seqs, max_num_batched_tokens)

    def blocks(n: int) -> list[int]:
        return [max(low, n if high is None else min(high, n)) for low, high in zip(least, most, strict=True)]

    def cost(n: int) -> int:
        # One block more per pool: the null block is real memory.
        return sum((b + 1) * g.block_bytes for b, g in zip(blocks(n), groups, strict=True))

    if cost(0) > bytes:
        raise NotEnoughMemory(
            f"the KV cache needs {cost(0)} bytes for one sequence of {max_model_len} tokens, {bytes} are available; "
            "lower max_model_len or give the cache more memory",
            needed=cost(0),
            available=bytes,
        )
    low, high = 0, bytes // max(1, min(g.block_bytes for g in groups)) + 1
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if cost(mid) <= bytes else (low, mid)
    return KVGeometry(groups=groups, num_blocks=tuple(b + 1 for b in blocks(low)))


def _useful(groups: tuple[KVGroup, ...], max_num_seqs: int, chunk: int) -> list[int | None]:
    """Per group the blocks that can ever be in use at once; None where more always helps."""
    bounded = [bool(g.window) and not g.lane for g in groups]
    if all(bounded):
        # No full group could take the rest: more window blocks at least keep more prefixes.
        return [None] * len(groups)
    return [max_num_seqs * (peak_blocks(g, 1 << 40, 1) + 1) + g.blocks(chunk) if w else None for g, w in zip(groups, bounded, strict=True)]
