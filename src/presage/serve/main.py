"""``presage serve``: the front in this process, the engine in another, one journal between them."""

from __future__ import annotations

import asyncio
import logging
import sys

from presage.core.config import EngineConfig
from presage.engine.remote import RemoteEngine
from presage.serve.api import create_app
from presage.serve.config import ServerConfig
from presage.serve.run import make_server, raise_file_limit

STATS_EVERY = 10.0
_log = logging.getLogger("presage.serve")


def serve_forever(config: EngineConfig, http: ServerConfig) -> int:
    """Serve until a signal. Raises the engine's typed error if it cannot start."""
    logging.basicConfig(level=http.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    raise_file_limit(http.max_connections + 256)
    try:
        import uvloop

        return uvloop.run(_serve(config, http))
    except ImportError:
        return asyncio.run(_serve(config, http))


async def _serve(config: EngineConfig, http: ServerConfig) -> int:
    engine = RemoteEngine(config)
    try:
        await engine.start()
        server = make_server(create_app(engine, http), http, engine.drain, engine.close)
        if not config.observability.disable_log_stats:
            watch = asyncio.create_task(_report(engine))
        where = http.uds or f"http{'s' if http.ssl_certfile else ''}://{http.host}:{http.port}"
        print(
            f"presage: {engine.model_names[0]} ready on {where}/v1 (context {engine.max_model_len}, {_gib(engine.info['kv_bytes'])} of KV cache)",
            file=sys.stderr,
        )
        await server.serve()
        if not config.observability.disable_log_stats:
            watch.cancel()
        return 0
    finally:
        await engine.close()


async def _report(engine: RemoteEngine) -> None:
    """One line of statistics every ten seconds in which something happened."""
    before = engine.stats()
    while True:
        await asyncio.sleep(STATS_EVERY)
        now = engine.stats()
        new = now.get("generated_tokens", 0) - before.get("generated_tokens", 0)
        if new or now.get("running"):
            _log.info(
                "%.1f tokens/s, %d running, %d waiting, KV %.0f %%, prefix hits %.0f %%",
                new / STATS_EVERY, now.get("running", 0), now.get("waiting", 0), 100 * now.get("kv_cache_usage", 0.0),
                100 * now.get("prefix_hits", 0) / max(1, now.get("prefix_queries", 0)),
            )  # fmt: skip
        before = now


def _gib(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.0f} MiB"
