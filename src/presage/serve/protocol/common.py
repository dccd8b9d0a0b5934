"""What bodies share: strictness, sampling fields, usage, errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    """A request body: unknown fields are errors that name the field, types are not coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())


class Lenient(BaseModel):
    """A part of a request that may carry more than we read (clients send back what other servers gave them)."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())


class Answer(BaseModel):
    """A response body; used for the OpenAPI document and in tests, never on the hot path."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send a last chunk with usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Put usage in every chunk."""
    include_obfuscation: bool | None = None
    """Accepted and unused."""


class SLO(Body):
    """What the request wants of time, in milliseconds after its arrival."""

    ttft_ms: float | None = Field(default=None, gt=0, le=1e9)
    """First token."""
    tpot_ms: float | None = Field(default=None, gt=0, le=1e9)
    """Each later token."""
    e2e_ms: float | None = Field(default=None, gt=0, le=1e9)
    """Last token."""


class SamplingBody(Body):
    """Sampling and serving fields that completions and chat share. vLLM's names; ranges are checked by SamplingParams."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Newer name of max_tokens."""
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    """Exactly one of json, regex, choice, grammar, json_object, structural_tag; and any_whitespace."""
    guided_json: str | dict[str, Any] | None = None
    """Older name of structured_outputs.json."""
    guided_regex: str | None = None
    """Older name of structured_outputs.regex."""
    guided_choice: list[str] | None = None
    """Older name of structured_outputs.choice."""
    guided_grammar: str | None = None
    """Older name of structured_outputs.grammar."""
    thinking_budget: int | None = None
    """Tokens at most before the end-of-thinking marker."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(default=None, ge=-(1 << 31), lt=1 << 31)
    """Lower runs first (with a scheduler that looks at it)."""
    slo: SLO | None = None
    program_id: str | None = Field(default=None, max_length=256)
    """Id of the program (workflow) the request belongs to."""
    stage: str | None = Field(default=None, max_length=256)
    """Name of the program's stage."""
    cache_salt: str | None = Field(default=None, max_length=1024)
    """Requests share prefix-cache entries only with requests of the same salt."""
    draft: dict[str, Any] | None = None
    """Speculation for this request: method, num_speculative_tokens, ..."""
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    """Accepted and unused."""


class PromptTokensDetails(Answer):
    """Parts of the prompt tokens."""

    cached_tokens: int = 0


class CompletionTokensDetails(Answer):
    """Parts of the output tokens."""

    reasoning_tokens: int = 0


class Usage(Answer):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class ErrorInfo(Answer):
    """What went wrong. The counts come with ``context_length_exceeded``."""

    message: str
    type: str
    param: str | None
    code: str | None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class ErrorResponse(Answer):
    """Every error has this body."""

    error: ErrorInfo


Finish = Literal["stop", "length", "tool_calls", "abort"]


class PromptLogprob(Answer):
    """One candidate at a prompt position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
