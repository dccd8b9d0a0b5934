"""Bad clients at the level of connections: too many of them, and request heads that never end."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from presage.core.errors import Overloaded
from presage.serve.errors import encode, error_body


def guarded_protocol(max_connections: int, header_timeout: float) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol with a limit on connections and a deadline for each request head.

    The deadline runs from the connection's start, or from the first byte after an answer, until the head is complete; trickling bytes do
    not extend it. uvicorn itself only limits idle time between requests.
    """
    body = encode(error_body(Overloaded("too many open connections")))
    lines = ["HTTP/1.1 503 Service Unavailable", "content-type: application/json", f"content-length: {len(body)}", "retry-after: 1"]
    refusal = "\r\n".join([*lines, "connection: close", "", ""]).encode() + body

    class GuardedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Answered without parsing a byte: under attack the cheapest answer is the right one.
            if len(self.connections) > max_connections:
                transport.write(refusal)
                transport.close()
                return
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head():
                self._expect_head()
            else:
                self._forget_head()

        def _in_head(self) -> bool:
            # IDLE means that no complete head has been read since the last answer.
            return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

        def _expect_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(header_timeout, self._too_slow)

        def _forget_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            self._head_timer = None
            if self._in_head():
                self.transport.close()

    return GuardedProtocol
