"""Who may share what was computed or learnt: the salt that keeps tenants apart."""

from __future__ import annotations

import hashlib


def salt_of(tenant: str, cache_salt: str | None) -> bytes:
    """Prefix-cache salt: tenants never share entries with each other, nor do different ``cache_salt`` values of one tenant."""
    if not tenant and not cache_salt:
        return b""
    # The length in front keeps ("a", "bc") and ("ab", "c") apart.
    text = f"{len(tenant)}:{tenant}{cache_salt or ''}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
