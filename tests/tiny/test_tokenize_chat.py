"""Chat templates render as transformers renders them, and a hostile one is stopped with a reason."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from presage.core.errors import ConfigError, RequestError
from presage.tokenize import ChatTemplate, Tokenizer
from presage.tokenize.chat import find_template
from tests.shared import shared_data

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
USER = {"role": "user", "content": "What is the weather in Pr\u00e4gue & Brno? <b>'\"</b>"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Let me see."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Brno"}}}],
}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": '{"degrees": 21}'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}, "unit": {"type": "string", "enum": ["C", "F"]}},
                "required": ["city"],
            },
        },
    }
]
CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = {
    "user": ([USER], None, True),
    "turns": ([USER, ASSISTANT, {"role": "user", "content": "And now?"}], None, True),
    "closed": ([SYSTEM, USER, ASSISTANT], None, False),
    "tools": ([SYSTEM, USER], TOOLS, True),
    "called": ([USER, CALL, RESULT], TOOLS, True),
    "reasoned": ([USER, {**ASSISTANT, "reasoning": "hm"}, USER], None, True),
    "odd": ([USER, USER], None, True),
}


def theirs(source: str, chat: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
    rendered, _ = render_jinja_template([chat], tools=tools, chat_template=source, add_generation_prompt=prompt, **SPECIAL)
    return str(rendered[0])


def outcome(call: Any) -> str:
    """The text, or that it failed; the date in some templates is the same for both."""
    try:
        return str(call())
    except Exception:
        return "<failed>"


@pytest.mark.parametrize("name", sorted(CHATS))
def test_all_templates_render_like_transformers(name: str) -> None:
    files = sorted(shared_data("chat_templates").glob("*.jinja"))
    chat, tools, prompt = CHATS[name]
    rendered = 0
    for file in files:
        source = file.read_text()
        template = ChatTemplate(source, SPECIAL, file.name)
        expected = outcome(lambda source=source: theirs(source, chat, tools, prompt))
        try:
            got = template.render(chat, tools, add_generation_prompt=prompt)
        except RequestError as error:
            assert file.name in error.message
            got = "<failed>"
        assert got == expected, file.name
        rendered += got != "<failed>"
    # Most templates take most conversations: the comparison is not of failures with failures.
    assert rendered >= len(files) // 2


def test_bundled_template_and_tinyllama() -> None:
    template = Tokenizer.load("presage-tiny").chat_template
    assert template is not None
    assert (
        template.render([SYSTEM, USER])
        == f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Tokenizer.load(shared_data("tokenizers/tinyllama")).chat_template is None
    qwen = Tokenizer.load(shared_data("tokenizers/qwen2.5")).chat_template
    assert qwen is not None
    assert qwen.render([USER], TOOLS) == theirs(qwen.sources["default"], [USER], TOOLS, True)


def test_the_final_message_can_stay_open() -> None:
    template = Tokenizer.load("presage-tiny").chat_template
    assert template is not None
    text = template.render([USER, {"role": "assistant", "content": "It is "}], add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nIt is ")
    with pytest.raises(RequestError, match="exclude each other"):
        template.render([USER], continue_final_message=True)
    with pytest.raises(RequestError, match="needs a last message with text"):
        template.render([{"role": "assistant", "content": ""}], add_generation_prompt=False, continue_final_message=True)


def test_where_templates_are_found(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T{{ tools|length }}"}]
    template = find_template(tmp_path, {"chat_template": listed, "bos_token": {"content": "<s>"}})
    assert template is not None
    assert template.render([USER]) == "D<s>"
    assert template.render([USER], TOOLS) == "T1"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert (found := find_template(tmp_path, {})) is not None
    assert found.render([]) == "J"
    (tmp_path / "chat_template.jinja").write_text("X{{ enable_thinking }}")
    assert (found := find_template(tmp_path, {"chat_template": "C"})) is not None
    assert found.render([], enable_thinking=True) == "XTrue"
    (tmp_path / "mine.jinja").write_text("M{{ eos_token }}")
    mine = Tokenizer.load("presage-tiny", chat_template=str(tmp_path / "mine.jinja")).chat_template
    assert mine is not None
    assert mine.render([]) == "M<|im_end|>"
    assert find_template(tmp_path / "nowhere", {}) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "undefined|no element 5"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "loops over more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops over more than"),
        ("{{ 'x' * 10 ** 9 }}", "repetition too large"),
        ("{% for i in range(99999) %}{{ 'y' * 1000 }}{% endfor %}", "wrote more than"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
        ("{% for m in messages %}", "does not parse"),
        ("{{ 2 ** 100000000 }}", "exponent too large"),
    ],
)
def test_bad_templates_are_the_requests_fault(source: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError, match=f"(?i){reason}"):
        ChatTemplate(source, SPECIAL).render([USER])
    assert time.monotonic() - started < 60


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("presage.tokenize.chat.MAX_SECONDS", 0.05)
    loops = (
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% if a.x %}{% endif %}{% endfor %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(RequestError, match="ran too long"):
        ChatTemplate(loops, {}).render([USER] * 2000)


def test_template_files(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"bad\.jinja does not parse \(line 1\)"):
        ChatTemplate.from_file(tmp_path / "bad.jinja")
