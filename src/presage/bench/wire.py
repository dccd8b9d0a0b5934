"""HTTP/1.1 by hand: connections that send prepared bytes and hand on pieces of the answer with the moment at which they came.

A general client does its work (headers, bodies, tasks, timers per request) between the moment a request is due and the moment it leaves;
this one has nothing left to do but write. It knows what answers of servers need: lengths, chunks, keep-alive, TLS.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from presage.core.errors import ConfigError


class Sink(Protocol):
    """What takes an answer: its status, pieces of its body, its end (``error`` is "" if it was whole)."""

    def head(self, status: int) -> None: ...

    def body(self, data: bytes, now: float) -> None: ...

    def end(self, error: str) -> None: ...


class Answer:
    """Reads one answer after the other from a byte stream."""

    def __init__(self) -> None:
        self.rest = b""
        self.state: Callable[[float], bool] = self._head
        self.left = 0
        self.close = False
        self.sink: Any = None

    def feed(self, data: bytes, now: float) -> bool:
        """Take bytes; True when the answer is complete. Raises ValueError for what is not HTTP."""
        self.rest += data
        while self.rest:
            if not self.state(now):
                return False
            if self.sink is None:
                return True
        return False

    def _head(self, now: float) -> bool:
        head, found, rest = self.rest.partition(b"\r\n\r\n")
        if not found:
            return False
        first, *lines = head.split(b"\r\n")
        if not first.startswith(b"HTTP/1."):
            raise ValueError(f"not an HTTP answer: {first[:60]!r}")
        status = int(first.split(b" ", 2)[1])
        self.rest = rest
        if status < 200:
            return True
        fields = {k.strip().lower(): v.strip().lower() for k, _, v in (line.partition(b":") for line in lines)}
        self.close = fields.get(b"connection") == b"close" or first.startswith(b"HTTP/1.0")
        self.sink.head(status)
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            self.state = self._size
        elif b"content-length" in fields:
            self.left, self.state = int(fields[b"content-length"]), self._counted
            return self._counted(now)
        else:
            self.left, self.state, self.close = 1 << 62, self._counted, True
        return True

    def _counted(self, now: float) -> bool:
        piece, self.rest = self.rest[: self.left], self.rest[self.left :]
        self.left -= len(piece)
        if piece:
            self.sink.body(piece, now)
        return self._done() if not self.left else False

    def _size(self, now: float) -> bool:
        line, found, rest = self.rest.partition(b"\r\n")
        if not found:
            return False
        self.left, self.rest = int(line.split(b";")[0], 16), rest
        self.state = self._chunk if self.left else self._trailer
        return True

    def _chunk(self, now: float) -> bool:
        if len(self.rest) < self.left + 2:
            return False
        self.sink.body(self.rest[: self.left], now)
        self.rest, self.state = self.rest[self.left + 2 :], self._size
        return True

    def _trailer(self, now: float) -> bool:
        line, found, rest = self.rest.partition(b"\r\n")
        if not found:
            return False
        self.rest = rest
        return self._done() if not line else True

    def _done(self) -> bool:
        sink, self.sink, self.state = self.sink, None, self._head
        sink.end("")
        return True


class Connection(asyncio.Protocol):
    """One connection: at most one request at a time; goes back to its pool when the answer is complete."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.answer = pool, Answer()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Ready."""
        self.transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes, sink: Sink) -> float:
        """Write a request; the moment at which the kernel had its bytes (or, over a full buffer, the first of them)."""
        self.answer.sink = sink
        self.transport.write(data)
        return time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        now = time.monotonic()
        if self.answer.sink is None:
            self.transport.abort()
            return
        try:
            done = self.answer.feed(data, now)
        except ValueError as error:
            self.fail(str(error))
            return
        if done:
            self.pool.put_back(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end: an answer without a length is complete now, any other is cut short."""
        self.pool.forget(self)
        answer = self.answer
        if answer.sink is not None:
            whole = answer.state == answer._counted and answer.left > 1 << 61 and exc is None
            sink, answer.sink = answer.sink, None
            sink.end("" if whole else f"the connection was closed{f': {exc}' if exc else ''}")

    def fail(self, error: str) -> None:
        """Give the request up; the connection cannot be used again."""
        sink, self.answer.sink = self.answer.sink, None
        self.transport.abort()
        if sink is not None:
            sink.end(error)


class Pool:
    """Connections to one server; ``spare`` are opened ahead, so that neither names nor TLS are waited for when a request is due.

    There is no upper limit: a cap on connections would silently close the loop.
    """

    def __init__(self, url: str, spare: int = 8) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url must be http(s)://host[:port], got {url!r}", param="base_url")
        self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self.path = parts.path or "/"
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.spare, self.opening = spare, 0
        self.idle: list[Connection] = []
        self.tasks: set[asyncio.Task[Any]] = set()
        self.address: tuple[str, int] | None = None

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    async def connect(self) -> Connection:
        """A new connection. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self.address is not None:
            return await self._open(*self.address)
        return await self._first(await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))

    async def _first(self, found: Sequence[Any]) -> Connection:
        # Names like localhost have several addresses; the first that answers is kept.
        failure: OSError = OSError(f"{self.host} has no address")
        for *_, address in found:
            try:
                made = await self._open(address[0], address[1])
            except OSError as error:
                failure = error
                continue
            self.address = address[0], address[1]
            return made
        raise failure

    async def _open(self, host: str, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(
            lambda: Connection(self), host, port, ssl=self.tls, server_hostname=self.host if self.tls else None
        )  # fmt: skip
        return made

    def take(self) -> Connection | None:
        """An open connection that nobody uses, if there is one."""
        found = None
        while self.idle and found is None:
            last = self.idle.pop()
            found = None if last.transport.is_closing() else last
        if len(self.idle) + self.opening < self.spare:
            self._later()
        return found

    def _later(self) -> None:
        self.opening += 1
        task = asyncio.get_running_loop().create_task(self._ahead())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _ahead(self) -> None:
        try:
            self.idle.append(await self.connect())
        except OSError:
            # The request that needs a connection will meet the same error and tell it.
            return
        finally:
            self.opening -= 1

    def put_back(self, used: Connection) -> None:
        """The answer is complete."""
        if used.answer.close or used.answer.rest:
            used.transport.close()
        elif not used.transport.is_closing():
            self.idle.append(used)

    def forget(self, lost: Connection) -> None:
        """It was closed."""
        if lost in self.idle:
            self.idle.remove(lost)

    async def warm(self) -> None:
        """Open the spare connections. Raises OSError if the server cannot be reached."""
        while len(self.idle) < self.spare:
            self.idle.append(await self.connect())

    def close(self) -> None:
        """Close what is idle; what is busy is left to its end."""
        for task in self.tasks:
            task.cancel()
        for one in [*self.idle]:
            one.transport.close()
