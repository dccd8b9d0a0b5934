"""Messages as clients send them, through the chat templates of well-known models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from presage.core.errors import RequestError
from presage.serve.chat_prompt import plain_message, render_turns
from presage.serve.protocol.chat import Message, Tool
from presage.tokenize import ChatTemplate
from tests.shared import shared_data

# What one template wants beside the usual names; a client sends such things as chat_template_kwargs.
FIREFUNCTION = {"functions": "[]", "datetime": "today"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = Tool.model_validate({"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}})
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Weather in Köln?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcDEF123", "name": "get_weather", "content": "12 degrees"},
]
# Templates without tools refuse the role or leave the turn out; both are theirs to decide.
WITH_TOOLS = ("Hermes", "Qwen2.5", "Llama-3.1", "Llama-3.2", "Llama-3.3", "Mistral-Nemo", "functionary-medium", "command-r7b")


def _templates() -> list[str]:
    return sorted(p.name for p in shared_data("chat_templates").glob("*.jinja"))


def _plain(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [plain_message(Message.model_validate(t), i) for i, t in enumerate(turns)]


def test_plain_conversations_render_everywhere() -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    for name in _templates():
        if "tool_use" in name:
            continue  # a second template of its model, only taken when there are tools
        text = _render(name, turns, None)
        assert text.index("one") < text.index("two") < text.index("three"), name


@pytest.mark.parametrize("marker", WITH_TOOLS)
def test_tool_turns_render_where_the_model_knows_them(marker: str) -> None:
    names = [n for n in _templates() if marker in n]
    assert names
    for name in names:
        text = _render(name, TURNS, [TOOL.model_dump(exclude_none=True)])
        assert text.count("get_weather") >= 2 and "12 degrees" in text, name
        assert '\\"city' not in text, f"{name} shows arguments encoded twice"


def _render(name: str, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(shared_data(f"chat_templates/{name}").read_text(), special)
    return render_turns(template, _plain(turns), {"tools": tools, **FIREFUNCTION})


def test_developer_is_system_and_arguments_are_objects() -> None:
    plain = _plain([{"role": "developer", "content": "x"}, *TURNS])
    assert plain[0]["role"] == "system" and plain[1]["content"] == "Weather in Köln?"
    assert plain[2]["content"] == "" and plain[2]["tool_calls"][0]["function"]["arguments"] == json.loads(CALL["function"]["arguments"])


def test_broken_arguments_of_earlier_turns_stay_as_they_are() -> None:
    broken = {**CALL, "function": {"name": "f", "arguments": '{"a": '}}
    assert _plain([{"role": "assistant", "tool_calls": [broken]}])[0]["tool_calls"][0]["function"]["arguments"] == '{"a": '
    with pytest.raises(RequestError):
        _plain([{"role": "tool", "tool_call_id": "x"}])
