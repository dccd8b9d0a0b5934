"""What ``LLM`` and ``AsyncLLM`` return, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token at a position; ``rank`` 1 is the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. ``finish_reason``: stop, length, abort or None while running; ``stop_reason``: the stop id or string."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether this continuation ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its continuations. ``num_cached_tokens``: prompt tokens whose KV was found in the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: dict[str, Any] | None = None


@dataclass(slots=True)
class EmbeddingOutput:
    """A pooled, L2-normalised hidden state."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """One text and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
