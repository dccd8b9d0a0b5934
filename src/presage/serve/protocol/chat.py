"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from presage.serve.protocol.common import Answer, Body, Finish, Lenient, PromptLogprob, SamplingBody, Usage


class TextPart(Lenient):
    """A piece of text."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class MediaPart(Lenient):
    """Pictures, sound and files: recognised so that the refusal can name them."""

    type: Literal["image_url", "input_audio", "file", "video_url", "audio_url", "input_image"]


class CalledFunction(Lenient):
    """A function the model called in an earlier turn; ``arguments`` is JSON text."""

    name: str
    arguments: str | None = None


class PastToolCall(Lenient):
    """A tool call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[TextPart | MediaPart, Field(discriminator="type")]] | None = None
    name: str | None = None
    tool_calls: list[PastToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionSpec(Lenient):
    """A function the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


class ChosenFunction(Body):
    """Name of the function that must be called."""

    name: str


class NamedChoice(Body):
    """Forces one tool."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchemaSpec(Body):
    """A JSON schema the output must follow."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Shape of the output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None


class ChatRequest(SamplingBody):
    """Answer a conversation. Fields from ``metadata`` on are accepted because OpenAI has them, and unused."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=4096)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(default=None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Go on writing the last message; needs add_generation_prompt: false."""
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    """False leaves reasoning_content out of the answer."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    """Only text."""
    functions: None = None
    """Not supported (use tools); null is accepted because some clients send every field."""
    function_call: None = None
    """Not supported (use tool_choice)."""
    audio: None = None
    """Not supported."""
    web_search_options: None = None
    """Not supported."""
    moderation: None = None
    """Not supported."""
    prompt_cache_options: None = None
    """Not supported."""


class TokenLogprob(Answer):
    """A token, its natural log probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """A generated token beside the most likely ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """Log probabilities of the generated tokens, end tokens included."""

    content: list[ChatTokenLogprob] | None
    refusal: None = None


class FunctionCall(Answer):
    """``arguments`` is JSON text as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Answer):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(Answer):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class FunctionDelta(Answer):
    """A piece of a call: the name comes whole, arguments in pieces."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Answer):
    """``id``, ``type`` and the name come with the first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answer):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    """One answer's addition."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Answer):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
