"""API keys, and the tenants they stand for."""

from __future__ import annotations

import hashlib

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from presage.core.errors import Unauthorized
from presage.serve.errors import error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"})


class ApiKeys:
    """Accepted keys. Looked up by digest: the time a lookup takes says nothing about the key, and no key stays in memory."""

    def __init__(self, keys: list[str]) -> None:
        self._tenants: dict[bytes, str] = {}
        for entry in keys:
            key, _, tenant = entry.partition(":")
            # The key itself has no colon by convention of every provider, so the first one ends it.
            digest = _digest(key)
            self._tenants[digest] = tenant or f"key-{digest.hex()[:12]}"

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, header: str | None) -> str:
        """The tenant of an Authorization header; "" if no keys are configured. Errors: Unauthorized."""
        if not self._tenants:
            return ""
        scheme, _, key = (header or "").partition(" ")
        tenant = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthorized("missing or wrong API key; send it as 'Authorization: Bearer KEY'")
        return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class AuthMiddleware:
    """Checks the key of every path that is not open and leaves the tenant in the scope's state."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            # Compared without the proxy's prefix, as the router does; anything not listed is closed, unknown paths too.
            path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
            try:
                state["tenant"] = "" if path in OPEN_PATHS else self.keys.tenant(Request(scope).headers.get("authorization"))
            except Unauthorized as error:
                return await error_response(error)(scope, receive, send)
        return await self.app(scope, receive, send)
