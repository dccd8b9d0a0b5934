"""Server-sent events, and giving up work whose client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from presage.serve.config import ServerConfig
from presage.serve.errors import encode, error_body, error_response, known

DONE = b"data: [DONE]\n\n"
PING = b": waiting\n\n"
T = TypeVar("T")


def event(body: Any) -> bytes:
    """One data event."""
    return b"data: " + encode(body) + b"\n\n"


async def gone(receive: Receive) -> None:
    """Return when the client has disconnected (the body must have been read)."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def stop(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as seen


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Result of ``work``, or None if the client left first (``work`` is cancelled then and aborts its requests)."""
    task, leave = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, leave}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await stop(leave)
        if not task.done():
            await stop(task)


class _Left(Exception):
    """The client closed the connection."""


class EventStream(Response):
    """Sends ``events`` (encoded data events) and [DONE].

    The head waits for the first event, at most ``stream_grace`` seconds, so that a refusal keeps its HTTP status. Later errors become
    one data event. Quiet spells are bridged with comments; a client that leaves or stops reading ends the work.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], config: ServerConfig) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=self.media_type)
        # A stream has no length; Starlette writes 0 for the empty body it was given.
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        self.events, self.config = events, config
        self.started, self.sending, self.last = False, False, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(scope, receive, send))
        watch = [asyncio.ensure_future(gone(receive)), asyncio.ensure_future(self._watch(send))]
        try:
            await asyncio.wait({pump, *watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*watch, pump):
                if not task.done():
                    await stop(task)
        if not pump.cancelled() and (error := pump.exception()) is not None and not isinstance(error, _Left):
            raise error

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.ensure_future(anext(aiter(self.events), None))  # type: ignore[arg-type]
        try:
            # After the grace the head goes out anyway: proxies give up on silent requests.
            await asyncio.wait({first}, timeout=self.config.stream_grace)
            if first.done() and (error := first.exception()) is not None:
                await error_response(known(error))(scope, receive, send)
                return
            await self._start(send)
            await self._events(first, send)
        finally:
            if not first.done():
                await stop(first)
            await self.events.aclose()  # type: ignore[attr-defined]

    async def _events(self, first: asyncio.Future[bytes | None], send: Send) -> None:
        try:
            chunk = await first
            if chunk is not None:
                await self._send(send, chunk)
            async for chunk in self.events:
                await self._send(send, chunk)
        except _Left:
            return
        except Exception as error:
            await self._send(send, event(error_body(known(error))))
        await self._send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self.started = True

    async def _send(self, send: Send, chunk: bytes) -> None:
        self.sending, self.last = True, asyncio.get_running_loop().time()
        try:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OSError:
            # Errors of the engine are OSErrors too (a dead process is a ConnectionError), so the client's are told apart here.
            raise _Left from None
        self.sending = False

    async def _watch(self, send: Send) -> None:
        """Returns when a send has hung for ``send_timeout``; pings while nothing is sent."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self.config.stream_ping, self.config.send_timeout) / 2)
            # One watcher per stream instead of a timer per chunk, which would double the cost of a token.
            quiet = loop.time() - self.last
            if self.sending and quiet > self.config.send_timeout:
                return
            if self.started and not self.sending and quiet > self.config.stream_ping:
                await self._send(send, PING)
