"""X-Request-Id: the client's own if it is sane, else a fresh one; returned with every answer and only used for that."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SANE = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Adds the header to every response. Engine ids are always our own: two clients sending one id must not meet."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Request(scope).headers.get("x-request-id", "")
        # A header of any other form could split lines in a log.
        name = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        return await self.app(scope, receive, tagged)
