"""Bodies of /v1/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from presage.serve.protocol.chat import ResponseFormat
from presage.serve.protocol.common import Answer, Finish, PromptLogprob, SamplingBody, Usage


class CompletionRequest(SamplingBody):
    """Continue one or more prompts, given as text or as token ids."""

    model: str | None = None
    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class CompletionLogprobs(Answer):
    """Parallel lists over tokens. Tokens that are no valid text alone are written ``bytes:\\xNN``."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(Answer):
    """The answer, and with ``stream`` each chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None)
