"""Tool calling over HTTP: automatic, forced and named, streamed and whole, with the functions of the Berkeley leaderboard."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.http.echo import EchoEngine
from tests.http.server import served
from tests.shared import shared_data

MODEL = "presage-tiny"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = (
    'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
)


def say(text: str) -> list[Any]:
    """Messages that make the engine say ``text``."""
    return [{"role": "user", "content": "SAY:" + text}]


def gathered(stream: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """(content, calls, finish_reason) of a stream, put together as client libraries do."""
    content, calls, finish = "", [], None
    for part in stream:
        choice = part.choices[0]
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for piece in choice.delta.tool_calls or []:
            if piece.id:
                assert piece.index == len(calls) and piece.type == "function"
                calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
            calls[piece.index]["arguments"] += piece.function.arguments or ""
    return content, calls, finish


def test_automatic_calls(client: openai.OpenAI) -> None:
    r = client.chat.completions.create(model=MODEL, messages=say(CALL), tools=[WEATHER, ADD])
    choice = r.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    calls = choice.message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("get_weather", {"city": "Köln"}), ("add", {"a": 1})]  # type: ignore[union-attr]
    assert len({c.id for c in calls}) == 2


def test_automatic_calls_streamed(client: openai.OpenAI) -> None:
    content, calls, finish = gathered(client.chat.completions.create(model=MODEL, messages=say(CALL), tools=[WEATHER, ADD], stream=True))
    assert (content, finish) == ("Let me look.", "tool_calls")
    assert [(c["name"], c["arguments"]) for c in calls] == [("get_weather", '{"city": "Köln"}'), ("add", '{"a": 1}')]


def test_no_call_is_plain_content(client: openai.OpenAI) -> None:
    r = client.chat.completions.create(model=MODEL, messages=say("no need"), tools=[WEATHER])
    assert (r.choices[0].message.content, r.choices[0].message.tool_calls, r.choices[0].finish_reason) == ("no need", None, "stop")


def test_choice_none_leaves_the_text(client: openai.OpenAI) -> None:
    r = client.chat.completions.create(model=MODEL, messages=say(CALL), tools=[WEATHER], tool_choice="none")
    assert r.choices[0].message.tool_calls is None and "<tool_call>" in (r.choices[0].message.content or "")


def test_named_function_constrains_and_wraps(client: openai.OpenAI, engine: object) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    args: dict[str, Any] = {"model": MODEL, "messages": say('{"city": "Bonn"}'), "tools": [WEATHER, ADD], "tool_choice": choice}
    r = client.chat.completions.create(**args)
    calls = r.choices[0].message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("get_weather", {"city": "Bonn"})]  # type: ignore[union-attr]
    assert r.choices[0].message.content is None
    assert gathered(client.chat.completions.create(**args, stream=True))[1][0]["arguments"] == '{"city": "Bonn"}'
    if hasattr(engine, "seen"):
        assert engine.seen[-1].sampling.structured_outputs.json == WEATHER["function"]["parameters"]


def test_required_constrains_to_an_array(client: openai.OpenAI, engine: object) -> None:
    text = '[{"name": "add", "parameters": {"a": 2}}]'
    r = client.chat.completions.create(model=MODEL, messages=say(text), tools=[WEATHER, ADD], tool_choice="required", parallel_tool_calls=False)
    calls = r.choices[0].message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in calls] == [("add", '{"a": 2}')]  # type: ignore[union-attr]
    if hasattr(engine, "seen"):
        schema = engine.seen[-1].sampling.structured_outputs.json
        assert schema["type"] == "array" and schema["minItems"] == schema["maxItems"] == 1


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_bad_choices(url: str, extra: dict[str, Any], param: str) -> None:
    r = httpx.post(url + "/v1/chat/completions", json={"messages": say("x"), **extra})
    assert r.status_code == 400 and r.json()["error"]["param"].startswith(param)


def test_auto_without_a_parser_says_how_to_get_one() -> None:
    with served(EchoEngine()) as base:
        r = httpx.post(base + "/v1/chat/completions", json={"messages": say("x"), "tools": [WEATHER]})
        assert r.status_code == 400 and "--enable-auto-tool-choice" in r.json()["error"]["message"]


def test_round_trip_of_calls_and_results(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages: list[Any] = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "user", "content": "SAY:two"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, tools=[ADD]).choices[0].message.content == "two"


@pytest.mark.parametrize("chunk", [1, 7])
def test_leaderboard_calls_come_back(chunk: int) -> None:
    """Every 40th question: the expected calls, written in Hermes' format, come back as tool calls."""
    rows = [json.loads(x) for x in shared_data("bfcl/parallel.jsonl").read_text().splitlines()][::40]
    answers = {a["id"]: a for a in map(json.loads, shared_data("bfcl/possible_answer_parallel.jsonl").read_text().splitlines())}
    with served(EchoEngine(chunk=chunk), enable_auto_tool_choice=True, tool_call_parser="hermes") as base:
        with openai.OpenAI(base_url=base + "/v1", api_key="x") as client:
            for row in rows:
                want = [(n, {k: v[0] for k, v in a.items()}) for call in answers[row["id"]]["ground_truth"] for n, a in call.items()]
                text = "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in want)
                tools: list[Any] = [{"type": "function", "function": {**f, "parameters": _json_schema(f["parameters"])}} for f in row["function"]]
                _, calls, finish = gathered(client.chat.completions.create(model=MODEL, messages=say(text), tools=tools, stream=True))
                assert [(c["name"], json.loads(c["arguments"])) for c in calls] == want and finish == "tool_calls"


def _json_schema(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "object" if (k, v) == ("type", "dict") else _json_schema(v) for k, v in value.items()}
    return [_json_schema(v) for v in value] if isinstance(value, list) else value
