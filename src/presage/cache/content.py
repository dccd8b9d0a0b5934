"""What makes two blocks equal: a chained hash of the tokens up to the block's end, rooted in everything else that shapes K and V.

vLLM V1's scheme: h_i = H(h_{i-1}, token ids of block i). 128-bit BLAKE2b: a collision would show one user another one's prefix.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol

from presage.core.kv import KVGroup
from presage.core.request import Request


class Content(Protocol):
    """Names the content of blocks. A replay of a log that holds no ids answers with the recorded names instead."""

    def root(self, slot: int, req: Request, groups: tuple[KVGroup, ...]) -> bytes:
        """Parent of the request's first block. Called by ``open``, so an implementation may remember who sits in ``slot``."""

    def hashes(self, slot: int, index: int, parent: bytes, ids_bytes: bytes) -> bytes:
        """Name of the slot's full block ``index``: ``parent`` names the block before it, ``ids_bytes`` are its ids as int32."""


class HashedContent:
    """The real thing. Pools keep separate maps, so a group's id needs no place in the hash and G groups cost one chain."""

    def root(self, slot: int, req: Request, groups: tuple[KVGroup, ...]) -> bytes:
        """Hash of salt, model, adapter and the groups' fingerprints (weights revision, codec, rope: whatever changes the bytes)."""
        h = blake2b(digest_size=16)
        # The presence byte tells "no adapter" from an adapter called "".
        adapter = b"\0" if req.adapter is None else b"\1" + req.adapter.encode()
        for part in (req.salt, req.model.encode(), adapter, *(g.fingerprint for g in groups)):
            # Length prefixes keep ("ab", "c") and ("a", "bc") apart: a salt must not be able to imitate a model name.
            h.update(len(part).to_bytes(8, "little") + part)
        return h.digest()

    def hashes(self, slot: int, index: int, parent: bytes, ids_bytes: bytes) -> bytes:
        """H(parent, ids), 16 bytes; about 1 microsecond for 32 ids."""
        return blake2b(parent + ids_bytes, digest_size=16).digest()
