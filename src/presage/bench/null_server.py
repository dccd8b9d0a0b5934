"""A server that computes nothing: it answers completions after ``ttft`` seconds with ``tokens`` pieces ``gap`` seconds apart.

It runs in a process of its own and notes when each request arrived on the clock that all processes share. So it tells what a generator
really did, whatever the generator says of itself. ``presage.bench`` needs it to know its own error; tests, to know what is measured.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from presage.bench.pace import realtime

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """One piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


PIECE = chunked(b'data: {"choices":[{"index":0,"text":"x"}]}\n\n')


def ending(tokens: int) -> bytes:
    """Finish, usage, [DONE] and the end of the body."""
    usage = b'{"prompt_tokens":1,"completion_tokens":%d}' % tokens
    last = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\ndata: {"choices":[],"usage":%b}\n\n' % usage
    return chunked(last + b"data: [DONE]\n\n") + b"0\r\n\r\n"


@dataclass(frozen=True)
class Behaviour:
    """How it answers, and at which second from its first request it stands still for how long (``stall``)."""

    ttft: float = 0.02
    gap: float = 0.01
    tokens: int = 16
    stall_at: float = float("inf")
    stall: float = 0.0


class NullProtocol(asyncio.Protocol):
    """One connection. Requests are told apart by Content-Length, answered in order."""

    def __init__(self, how: Behaviour, arrivals: list[float]) -> None:
        self.how, self.arrivals, self.rest = how, arrivals, b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Ready."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        now = time.monotonic()
        self.rest += data
        while b"\r\n\r\n" in self.rest:
            head, _, body = self.rest.partition(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
            if len(body) < length:
                return
            self.rest = body[length:]
            self.arrivals.append(now)
            self._answer(now)

    def _answer(self, now: float) -> None:
        how, loop = self.how, asyncio.get_running_loop()
        begun = self.arrivals[0] + how.stall_at
        # Who comes while it stands still waits for its end.
        first = max(now + how.ttft, begun + how.stall) if now + how.ttft >= begun and now < begun + how.stall else now + how.ttft
        pieces = [HEAD + PIECE, *[PIECE] * (how.tokens - 1)]
        pieces[-1] += ending(how.tokens)
        if not how.gap:
            # Timers of one moment run in any order.
            pieces = [b"".join(pieces)]
        for i, piece in enumerate(pieces):
            loop.call_at(first + i * how.gap, self._write, piece)

    def _write(self, piece: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(piece)


async def _serve(how: Behaviour, pipe: Any) -> None:
    arrivals: list[float] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: NullProtocol(how, arrivals), "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    while (await loop.run_in_executor(None, pipe.recv)) == "arrivals":
        pipe.send([*arrivals])
        arrivals.clear()


def _main(how: Behaviour, pipe: Any, fast: bool) -> None:
    with realtime(fast):
        asyncio.run(_serve(how, pipe))


class NullServer:
    """The running server: its address, and the moments (monotonic seconds) at which requests came since it was last asked."""

    def __init__(self, url: str, pipe: Any) -> None:
        self.url, self._pipe = url, pipe

    def arrivals(self) -> list[float]:
        """Moments of arrival, in order; forgotten afterwards."""
        self._pipe.send("arrivals")
        found: list[float] = self._pipe.recv()
        return found


@contextmanager
def null_server(how: Behaviour | None = None, fast: bool = False) -> Iterator[NullServer]:
    """The server in a process of its own while inside; ``fast``: with real-time priority, so that its notes are not late themselves."""
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_main, args=(how or Behaviour(), theirs, fast), daemon=True)
    process.start()
    try:
        yield NullServer(f"http://127.0.0.1:{ours.recv()}", ours)
    finally:
        ours.send("stop")
        process.join(5)
        if process.is_alive():
            process.kill()
