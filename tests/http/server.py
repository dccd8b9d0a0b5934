"""The application under a real uvicorn in a thread, on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from presage.serve.api import create_app
from presage.serve.config import ServerConfig
from presage.serve.run import Server, make_server


@contextlib.contextmanager
def served(engine: Any, **settings: Any) -> Iterator[str]:
    """Base URL of a running server around ``engine``."""
    config = ServerConfig(**{"port": 0, "log_level": "error", "shutdown_timeout": 1.0, **settings})
    server = make_server(create_app(engine, config), config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{_port(server)}"
    finally:
        server.should_exit = True
        thread.join(10)


def _port(server: Server) -> int:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if server.started:
            return int(server.servers[0].sockets[0].getsockname()[1])
        time.sleep(0.01)
    raise TimeoutError("the server did not start")


def eventually(check: Any, seconds: float = 5.0) -> bool:
    """True as soon as ``check()`` is; False if it never gets so in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.01)
    return bool(check())
