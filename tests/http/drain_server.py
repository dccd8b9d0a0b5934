"""A server process for the drain test: prints its port, writes "drained" when the hook ran."""

from __future__ import annotations

import asyncio

from presage.serve.api import create_app
from presage.serve.config import ServerConfig
from presage.serve.run import Server, make_server
from tests.http.echo import EchoEngine


async def _drained() -> None:
    print("drained", flush=True)


async def _tell_port(server: Server) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)


async def _main() -> None:
    config = ServerConfig(port=0, shutdown_timeout=20, log_level="error")
    server = make_server(create_app(EchoEngine(), config), config, _drained)
    await asyncio.gather(server.serve(), _tell_port(server))


if __name__ == "__main__":
    asyncio.run(_main())
