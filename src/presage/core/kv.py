"""KV groups: layers that share one block table, as plain data that manager, scheduler, executor and simulator read."""

from __future__ import annotations

import msgspec

BLOCK_TOKENS = 32
"""Default tokens per block: one SIMD tile of the CPU attention kernel, and the granularity of prefix hashes."""


class KVGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers x heads that share one block table (Jenga, arXiv 2503.18292; vLLM's KV cache groups).

    ``layers`` maps (model layer, cache slot inside the group): equal slots mean KV shared across layers.
    ``window`` 0 keeps every block; w > 0 keeps the last w tokens and the first ``sinks`` ones.
    ``block_bytes`` is the device bytes of one block over all cache slots of the group.
    ``publish`` is exact | approximate | never. ``fingerprint`` goes into the root of the hash chain.
    """

    layers: tuple[tuple[int, int], ...]
    heads: int
    head_dim: int
    block_bytes: int
    block_tokens: int = BLOCK_TOKENS
    window: int = 0
    sinks: int = 0
    lane: int = 0
    publish: str = "exact"
    fingerprint: bytes = b""

    def first_kept(self, length: int) -> int:
        """First token index a sequence of ``length`` committed tokens still needs (0 for a full group)."""
        # The next query sits at index `length` and sees keys j > length - window.
        return max(0, length - self.window + 1) if self.window else 0

    def blocks(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)


class KVGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """All groups of an engine and how many blocks each pool has (block 0 of each pool is the null block)."""

    groups: tuple[KVGroup, ...]
    num_blocks: tuple[int, ...]
