"""The state of one server: the engine client, its settings, and what the routes share. Lives in ``app.state.front``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from presage.core.errors import Draining, UnknownModel
from presage.serve.auth import ApiKeys
from presage.serve.body import BodyReader
from presage.serve.client import EngineClient
from presage.serve.config import ServerConfig
from presage.serve.metrics import Metrics

THREAD_CHARS = 20_000
T = TypeVar("T")


class Front:
    """``live`` counts requests that are in the engine or being prepared; ``draining`` refuses new ones. ``clock`` is the engine's clock."""

    def __init__(self, client: EngineClient, config: ServerConfig) -> None:
        self.client, self.config = client, config
        self.keys = ApiKeys(config.api_key)
        self.bodies = BodyReader(config)
        # Aliases replace the base model's own name; adapters keep theirs.
        self.names = [*config.served_model_name, *client.model_names[1:]] if config.served_model_name else list(client.model_names)
        self.metrics = Metrics(client, self.names[0], config.vllm_metrics)
        self.created = int(time.time())
        self.clock: Callable[[], float] = time.monotonic
        self.live = 0
        self.reading_log = asyncio.Lock()
        self.draining = False

    def admit(self) -> None:
        """Refuse new work while draining."""
        if self.draining:
            raise Draining("the server is shutting down", retry_after=5)

    def model(self, name: str | None) -> tuple[str, str]:
        """(name to report, name the engine knows) of a request's model. Errors: UnknownModel."""
        if name is None:
            name = self.names[0]
        if name not in self.names:
            raise UnknownModel(f"the model {name[:200]!r} does not exist; served here: {', '.join(self.names)}", param="model")
        base = name in self.config.served_model_name
        return name, self.client.model_names[0] if base else name

    async def off_loop(self, chars: int, work: Callable[[], T]) -> T:
        """Run text work; long texts in a thread, so that they do not hold up everybody's streams."""
        return await asyncio.to_thread(work) if chars > THREAD_CHARS else work()


def front_of(request: HttpRequest) -> Front:
    """The server's state."""
    front: Front = request.app.state.front
    return front


def tenant_of(request: HttpRequest) -> str:
    """The tenant the request's key stands for; "" without keys."""
    return str(getattr(request.state, "tenant", ""))
