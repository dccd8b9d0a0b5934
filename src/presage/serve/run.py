"""Running the application under uvicorn, with a drain between SIGTERM and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from presage.core.errors import Draining
from presage.serve.config import ServerConfig
from presage.serve.errors import error_response
from presage.serve.front import Front
from presage.serve.guard import guarded_protocol

Drain = Callable[[], Awaitable[None]]
MAX_HEAD_BYTES = 64 << 10
LAST_SECONDS = 2
log = logging.getLogger("presage.serve")


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second ends at once.

    While draining, new requests get 503 ``draining`` and running ones may finish within ``shutdown_timeout``.
    """

    def __init__(self, config: uvicorn.Config, front: Front, drain: Drain | None, close: Drain | None = None) -> None:
        super().__init__(config)
        self._front, self._drain, self._close = front, drain, close
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self._front.draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._front.draining = True
        # uvicorn raises it again after the end, so that the exit status tells the supervisor the truth.
        self._captured_signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._front.draining and self._draining is None:
            self._draining = asyncio.ensure_future(self._finish())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End connections, then what is behind them: after this uvicorn raises the signal again, and SIGTERM leaves time for nothing."""
        await super().shutdown(sockets)
        if self._close is not None:
            await self._close()

    async def _finish(self) -> None:
        front = self._front
        log.info("draining %d requests", front.live)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(front.config.shutdown_timeout):
                if self._drain is not None:
                    await self._drain()
                # The hook drains the engine; what is left is text on its way to slow readers.
                while front.live:
                    await asyncio.sleep(0.05)
        self.should_exit = True


class _EndQuietly:
    """What the end of the server cuts off gets a 503 if it had no answer yet, and not a page of traceback in the log."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] != "http" or started:
                raise
            await error_response(Draining("the server has shut down", retry_after=5))(scope, receive, send)


def make_server(app: FastAPI, config: ServerConfig, drain: Drain | None = None, close: Drain | None = None) -> Server:
    """A server to ``serve()`` in a loop of your own. ``drain`` is awaited once when the end begins (it may end the engine's requests), ``close``
    when all connections have ended."""
    settings = uvicorn.Config(
        _EndQuietly(app),
        host=config.host,
        port=config.port,
        uds=config.uds,
        http=guarded_protocol(config.max_connections, config.header_timeout),
        ws="none",
        loop=_loop(),
        lifespan="on",
        backlog=2048,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=2 if config.ssl_ca_certs else 0,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=LAST_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_level=config.log_level,
        access_log=config.access_log,
        server_header=False,
    )
    return Server(settings, app.state.front, drain, close)


def run(app: FastAPI, config: ServerConfig, drain: Drain | None = None) -> None:
    """Serve until a signal ends it. Blocks."""
    raise_file_limit(config.max_connections + 256)
    make_server(app, config, drain).run()


def raise_file_limit(wanted: int) -> None:
    """Allow as many open files as there may be connections, as far as the system lets us."""
    try:
        import resource
    except ImportError:  # not on Windows, whose limit is elsewhere
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def _loop() -> str:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return "asyncio"
    return "uvloop"
