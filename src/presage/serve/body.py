"""Reading a request body: bounded in size, in time and in nesting, and strict about what is JSON."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from presage.core.errors import Overloaded, RequestError
from presage.serve.config import ServerConfig
from presage.serve.errors import BadMediaType, BodyTimeout, BodyTooLarge

MAX_DEPTH = 128
DISCARD_BYTES = 64 << 20
DISCARD_SECONDS = 2.0

B = TypeVar("B", bound=BaseModel)


class BodyReader:
    """Reads bodies for one server; ``held`` counts the bytes of all unfinished ones, so that many slow senders cannot fill the memory."""

    def __init__(self, config: ServerConfig) -> None:
        self.config, self.held = config, 0

    async def read(self, request: Request, kind: type[B]) -> B:
        """The body as ``kind``. Errors: BodyTooLarge, BodyTimeout, BadMediaType, Overloaded, RequestError naming the field."""
        _check_type(request.headers.get("content-type"))
        # A client that says how much it will send is refused before it has sent it.
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.config.max_body_bytes:
            await self._discard(request)
            raise self._too_large()
        try:
            async with asyncio.timeout(self.config.body_timeout):
                data = await self._collect(request)
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {self.config.body_timeout:g} seconds") from None
        except ClientDisconnect:
            raise RequestError("the client left before its body was complete") from None
        # What we do with the request from here on is our time; how slowly it was sent is not.
        request.state.arrived = time.monotonic()
        return parse(data, kind)

    async def _collect(self, request: Request) -> bytes:
        data, counted = bytearray(), 0
        try:
            async for chunk in request.stream():
                data += chunk
                # Counted as it arrives, not as declared: a lying header must not get past the limit.
                self.held += len(data) - counted
                counted = len(data)
                if counted > self.config.max_body_bytes:
                    data.clear()
                    await self._discard(request)
                    raise self._too_large()
                if self.held > self.config.max_buffered_bytes:
                    raise Overloaded("too many request bodies are arriving at once", retry_after=1)
        finally:
            self.held -= counted
        return bytes(data)

    async def _discard(self, request: Request) -> None:
        # Closing with unread data resets the connection and the client never sees the answer, so read on for a moment without keeping it.
        if "expect" in request.headers:
            return
        seen = 0
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while seen < DISCARD_BYTES:
                    message = await request.receive()
                    seen += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
        except (TimeoutError, ClientDisconnect):
            return

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body exceeds {self.config.max_body_bytes} bytes")


def _check_type(value: str | None) -> None:
    kind = (value or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise BadMediaType(f"content type must be application/json, got {kind[:100]!r}")


def parse(data: bytes, kind: type[B]) -> B:
    """JSON bytes to a body. RFC 8259 only: no NaN, no lone surrogates, no bad UTF-8, at most ``MAX_DEPTH`` levels."""
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    # Counting brackets is cheap and settles nearly every body; only the rest is walked.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise explain(error) from None


def _deeper(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        inner = [v for c in level for v in (c.values() if isinstance(c, dict) else c)]
        level = [v for v in inner if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def explain(error: ValidationError) -> RequestError:
    """pydantic's complaints as one error: the first field is ``param``, at most three are worded, values are not echoed."""
    # Input values stay out of the message: they may be megabytes, and they may be secrets.
    found = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(str(p) for p in found[0]["loc"])
    if found[0]["type"] == "extra_forbidden":
        return RequestError(f"unknown field {where[:200]!r}", param=where[:200])
    # A union reports each of its branches ("prompt.str", "prompt.list[int]"): the field itself is what the client knows.
    # A union reports each branch that failed; the same words for the same field are said once.
    lines = [f"{'.'.join(_plain(e['loc'])) or 'body'}: {e['msg']}" for e in found[:3]]
    return RequestError("; ".join(dict.fromkeys(lines)), param=".".join(_plain(found[0]["loc"])) or None)


def _plain(loc: tuple[int | str, ...]) -> list[str]:
    return [str(p)[:100] for p in loc if isinstance(p, int) or (p.replace("_", "").isalnum() and p not in _KINDS)]


_KINDS = frozenset({"str", "int", "float", "bool", "NamedChoice", "TextPart", "MediaPart", "text", "refusal", "function-after"})
