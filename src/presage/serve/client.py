"""What the HTTP front needs from an engine, in process or in another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
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
    drafting: bool
    """Is there a drafter that requests may steer?"""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def submit(self, request: Request) -> AsyncIterator[Emission] | Awaitable[AsyncIterator[Emission]]:
        """Queue a request and return its emissions; they end when every branch 0..n-1 had one with ``finish`` set.

        May be an async generator or a coroutine that returns an iterator.

        Errors: a RequestError or Overloaded, raised here or by the first step of the iterator, means that nothing was queued.
        """

    async def abort(self, request_id: str) -> None:
        """Forget a request in any state; unknown ids are ignored."""

    async def health(self) -> bool:
        """True while the loop is alive and answering."""

    async def decision_log(self) -> str | None:
        """Folder of the decision log, after what is buffered was written; None if the engine keeps none."""

    def stats(self) -> dict[str, Any]:
        """Gauges and counters since start; absent ones read as 0.

        running, waiting, kv_cache_usage (0..1), free_blocks, prefix_queries, prefix_hits (tokens), preemptions, steps, step_seconds,
        predicted_step_seconds, computed_tokens, faults, policy_errors, log_dropped, spec_num_drafts, spec_num_draft_tokens,
        spec_num_accepted_tokens, spec_num_accepted_tokens_per_pos, spec_num_draft_tokens_per_pos (lists by place in the
        draft), spec_num_accepted_tokens_by_method, spec_num_draft_tokens_by_method (counts by drafter).
        """


async def open_stream(client: EngineClient, request: Request) -> AsyncIterator[Emission]:
    """The emissions of a request, whichever way the client writes ``submit``."""
    stream = client.submit(request)
    return stream if isinstance(stream, AsyncIterator) else await stream
