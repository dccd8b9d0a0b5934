"""What the HTTP front needs from an engine, in process or in another one."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from presage.core.request import Emission, Request


class EngineClient(Protocol):
    """An engine as the front sees it: requests in, emissions out.

    ``tokenizer`` and ``chat_template`` are those of ``presage.tokenize``; ``chat_template`` is None for a model without one.
    ``eos_ids`` are the ids that end a text unless ``ignore_eos``. ``model_names[0]`` is the name reported for the base model.
    """

    model_names: list[str]
    max_model_len: int
    vocab_size: int

    @property
    def tokenizer(self) -> Any: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    async def submit(self, request: Request) -> AsyncIterator[Emission]:
        """Queue a request and return its emissions; they end when every branch 0..n-1 had one with ``finish`` set.

        Errors: a RequestError or Overloaded, raised here or by the first step of the iterator, means that nothing was queued.
        """

    async def abort(self, request_id: str) -> None:
        """Forget a request in any state; unknown ids are ignored."""

    async def health(self) -> bool:
        """True while the loop is alive and answering."""

    def stats(self) -> dict[str, Any]:
        """Counters and gauges since start: running, waiting, kv_cache_usage, prefix_queries, prefix_hits, preemptions, ..."""


async def open_stream(client: EngineClient, request: Request) -> AsyncIterator[Emission]:
    """Submit, for clients that write ``submit`` as a coroutine as well as for those that write it as an async generator."""
    stream: Any = client.submit(request)
    if inspect.isawaitable(stream):
        stream = await stream
    return stream  # type: ignore[no-any-return]
