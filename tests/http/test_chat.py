"""/v1/chat/completions through the official client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.http.echo import EchoEngine
from tests.http.server import served

MODEL = "presage-tiny"


def say(text: str) -> list[dict[str, Any]]:
    """Messages that make the engine say ``text``."""
    return [{"role": "user", "content": "SAY:" + text}]


def test_answer(client: openai.OpenAI) -> None:
    r = client.chat.completions.create(model=MODEL, messages=say("good morning"))  # type: ignore[arg-type]
    message = r.choices[0].message
    assert (message.role, message.content, r.choices[0].finish_reason) == ("assistant", "good morning", "stop")
    assert r.id.startswith("chatcmpl-") and r.usage is not None and r.usage.completion_tokens > 1
    assert r.usage.prompt_tokens_details is not None and r.usage.prompt_tokens_details.cached_tokens is not None


def test_stream_starts_with_the_role(client: openai.OpenAI) -> None:
    parts = list(client.chat.completions.create(model=MODEL, messages=say("good morning"), stream=True))  # type: ignore[arg-type]
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(p.choices[0].delta.role is None for p in parts[1:])
    assert "".join(p.choices[0].delta.content or "" for p in parts) == "good morning"
    assert parts[-1].choices[0].finish_reason == "stop"
    assert len({p.id for p in parts}) == 1


def test_n_streams_are_separate(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for part in client.chat.completions.create(model=MODEL, messages=say("abc def"), n=3, stream=True):  # type: ignore[arg-type]
        texts[part.choices[0].index] += part.choices[0].delta.content or ""
    assert texts == ["abc def"] * 3
    r = client.chat.completions.create(model=MODEL, messages=say("abc def"), n=3)  # type: ignore[arg-type]
    assert [(c.index, c.message.content) for c in r.choices] == [(i, "abc def") for i in range(3)]


def test_content_parts_and_roles(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "text", "text": "SAY:parts"}]},
    ]
    r = client.chat.completions.create(model=MODEL, messages=messages)
    assert r.choices[0].message.content == "parts"


def test_pictures_are_refused_by_name(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
    with pytest.raises(openai.BadRequestError, match="image_url") as caught:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.param == "messages.0.content"


def test_logprobs(client: openai.OpenAI) -> None:
    r = client.chat.completions.create(model=MODEL, messages=say("né 😀"), logprobs=True, top_logprobs=3)  # type: ignore[arg-type]
    found = r.choices[0].logprobs
    assert found is not None and found.content is not None
    assert len(found.content) == r.usage.completion_tokens  # type: ignore[union-attr]
    assert all(len(t.top_logprobs) == 3 and t.bytes is not None for t in found.content)
    assert b"".join(bytes(t.bytes or []) for t in found.content[:-1]).decode() == "né 😀"
    parts = list(client.chat.completions.create(model=MODEL, messages=say("né 😀"), logprobs=True, stream=True))  # type: ignore[arg-type]
    tokens = [t.token for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.content or []]
    assert tokens == [t.token for t in found.content]


def test_usage_chunk(client: openai.OpenAI) -> None:
    parts = list(client.chat.completions.create(model=MODEL, messages=say("abc"), stream=True, stream_options={"include_usage": True}))  # type: ignore[arg-type]
    assert parts[-1].choices == [] and parts[-1].usage is not None
    assert parts[-1].usage.total_tokens == parts[-1].usage.prompt_tokens + parts[-1].usage.completion_tokens


def test_unused_openai_fields_are_accepted(client: openai.OpenAI) -> None:
    r = client.chat.completions.create(
        model=MODEL,
        messages=say("ok"),
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        verbosity="low",  # type: ignore[arg-type]
    )
    assert r.choices[0].message.content == "ok"


def test_parse_helper_sends_the_schema(client: openai.OpenAI, engine: object) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    client.chat.completions.create(model=MODEL, messages=say('{"a":1}'), response_format=shape)  # type: ignore[arg-type]
    seen = getattr(engine, "seen", None)
    if seen is None:
        pytest.skip("this engine does not show its requests")
    assert seen[-1].sampling.structured_outputs.json == schema
    client.chat.completions.create(model=MODEL, messages=say("{}"), response_format={"type": "json_object"})  # type: ignore[arg-type]
    assert seen[-1].sampling.structured_outputs.json_object is True
    client.chat.completions.create(model=MODEL, messages=say("yes"), extra_body={"guided_choice": ["yes", "no"]})  # type: ignore[arg-type]
    assert seen[-1].sampling.structured_outputs.choice == ["yes", "no"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "alien", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", "hello"),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "yaml"}),
        ("top_logprobs", 3),
        ("tool_choice", "required"),
        ("tools", [{"type": "function", "function": {"name": "bad name!"}}]),
        ("chat_template_kwargs", {"messages": []}),
        ("modalities", ["audio"]),
        ("max_completion_tokens", 0),
        ("functions", []),
    ],
)
def test_bad_values_name_the_field(url: str, field: str, value: object) -> None:
    r = httpx.post(url + "/v1/chat/completions", json={"model": MODEL, "messages": say("x"), field: value})
    assert r.status_code == 400
    assert (r.json()["error"]["param"] or "").startswith(field)


def test_two_constraints_are_refused(url: str) -> None:
    body = {"messages": say("x"), "response_format": {"type": "json_object"}, "guided_regex": "a"}
    r = httpx.post(url + "/v1/chat/completions", json=body)
    assert r.status_code == 400 and "constraint" in r.json()["error"]["message"]


def test_continue_the_last_message(client: openai.OpenAI, engine: object) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I was SAY:going on"}]
    body = {"add_generation_prompt": False, "continue_final_message": True}
    r = client.chat.completions.create(model=MODEL, messages=messages, extra_body=body)
    if hasattr(engine, "seen"):
        assert r.choices[0].message.content == "going on"


@pytest.mark.parametrize(("parser", "text"), [("deepseek_r1", "let me see</think>42"), ("qwen3", "<think>let me see</think>42")])
def test_reasoning(parser: str, text: str) -> None:
    with served(EchoEngine(), reasoning_parser=parser) as base, openai.OpenAI(base_url=base + "/v1", api_key="x") as client:
        r = client.chat.completions.create(model=MODEL, messages=say(text))  # type: ignore[arg-type]
        message = r.choices[0].message
        assert message.content == "42"
        assert (message.model_extra or {})["reasoning_content"] == "let me see"
        details = r.usage.completion_tokens_details if r.usage else None
        assert details is not None and 0 < (details.reasoning_tokens or 0) < r.usage.completion_tokens  # type: ignore[union-attr]
        parts = list(client.chat.completions.create(model=MODEL, messages=say(text), stream=True))  # type: ignore[arg-type]
        deltas = [p.choices[0].delta for p in parts]
        assert "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas) == "let me see"
        assert "".join(d.content or "" for d in deltas) == "42"
        hidden = client.chat.completions.create(model=MODEL, messages=say(text), extra_body={"include_reasoning": False})  # type: ignore[arg-type]
        assert "reasoning_content" not in (hidden.choices[0].message.model_extra or {})
