"""Bodies of the small endpoints: models, embeddings, tokenize, status."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from presage.serve.protocol.chat import Message, Tool
from presage.serve.protocol.common import Answer, Body


class ModelCard(Answer):
    """A served name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    """Every served name."""

    object: Literal["list"]
    data: list[ModelCard]


class EmbeddingRequest(Body):
    """Embed one or more texts (or token ids)."""

    model: str | None = None
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    """Must equal the model's size: cutting an embedding that was not trained for it gives bad vectors."""
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    """Scale to length 1 (default)."""
    add_special_tokens: bool | None = None
    priority: int | None = Field(default=None, ge=-(1 << 31), lt=1 << 31)
    cache_salt: str | None = Field(default=None, max_length=1024)
    user: str | None = None
    """Accepted and unused."""


class EmbeddingData(Answer):
    """One vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Answer):
    """Vectors in the order of the inputs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingData]
    usage: EmbeddingUsage


class TokenizeRequest(Body):
    """Text, or messages that go through the chat template first."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, max_length=4096)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Answer):
    """Ids and limits."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids to text."""

    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 20)


class DetokenizeResponse(Answer):
    """The text, special tokens included."""

    prompt: str


class Status(Answer):
    """Health of the server."""

    status: Literal["ok", "draining", "dead"]


class Load(Answer):
    """Requests in this server and in the engine."""

    server_load: int
    num_requests_running: int
    num_requests_waiting: int


class Version(Answer):
    """Version of the server."""

    version: str
