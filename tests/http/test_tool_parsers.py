"""Tool-call and reasoning parsers: any way of cutting a text into chunks gives what the whole text gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.serve.reasoning import ThinkParser
from presage.serve.tools import PARSERS, ToolDelta, ToolParser
from presage.serve.tools.array import ArrayParser
from presage.serve.tools.named import NamedParser

NAMES = frozenset({"add", "get_weather", "math.sqrt", "f"})
Result = tuple[str, list[tuple[str, str]]]


def run(parser: ToolParser, chunks: Iterable[str]) -> Result:
    """(content, [(name, arguments), ...])."""
    content, calls = "", []
    pieces = [p for c in chunks for p in parser.feed(c)] + parser.finish()
    for piece in pieces:
        if isinstance(piece, ToolDelta):
            if piece.name:
                assert piece.id and piece.index == len(calls)
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
        else:
            content += piece
    return content, [(n, a) for n, a in calls]


def make(kind: str) -> ToolParser:
    """A parser by name; ``array`` and ``named`` are the forced ones."""
    if kind == "array":
        return ArrayParser(NAMES)
    return NamedParser("f") if kind == "named" else PARSERS[kind](NAMES)


CASES: list[tuple[str, str, Result]] = [
    ("hermes", "just text", ("just text", [])),
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>',
        ("", [("add", '{"a": 1, "b": [2, "}"]}')]),
    ),
    (
        "hermes",
        'Sure.\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"add","arguments":{"x":"<tool_call>"}}</tool_call>',
        ("Sure.", [("f", "{}"), ("add", '{"x":"<tool_call>"}')]),
    ),
    ("hermes", '<tool_call>{"arguments": {"q": "\\"x\\\\"}, "name": "f"}</tool_call> after', (" after", [("f", '{"q": "\\"x\\\\"}')])),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a": 1}')])),
    ("hermes", "<tool_call>not json</tool_call> x", ("<tool_call>not json</tool_call> x", [])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', ("", [("f", '{"a": ')])),
    ("hermes", "a < b and <tool_cal", ("a < b and <tool_cal", [])),
    ("hermes", " spaced \n", (" spaced \n", [])),
    ("hermes", '<tool_call>{"nam', ('<tool_call>{"nam', [])),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Bonn"}}', ("", [("get_weather", '{"city": "Bonn"}')])),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "add", "parameters": {"a":1}}',
        ("", [("f", "{}"), ("add", '{"a":1}')]),
    ),
    ("llama3_json", '{"name": "Bob", "age": 3}', ('{"name": "Bob", "age": 3}', [])),
    ("llama3_json", ' {"answer": {"name": "f"}}', (' {"answer": {"name": "f"}}', [])),
    ("llama3_json", 'Hello {"name": "f"}', ('Hello {"name": "f"}', [])),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"n": 1.5e3}}', ("", [("f", '{"n": 1.5e3}')])),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]',
        ("", [("add", '{"a": 1}'), ("f", "{}")]),
    ),
    ("mistral", 'Well [TOOL_CALLS][{"name": "f", "arguments": {"s": "]"}}]', ("Well", [("f", '{"s": "]"}')])),
    ("mistral", '[TOOL_CALLS]add{"a": {"b": 1}}[TOOL_CALLS]f[ARGS]{}', ("", [("add", '{"a": {"b": 1}}'), ("f", "{}")])),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abc123DEF[ARGS]{"a": 1}', ("", [("add", '{"a": 1}')])),
    ("mistral", "[TOOL_CALLS", ("[TOOL_CALLS", [])),
    ("mistral", "[TOOL_CALLS] hm, no", ("[TOOL_CALLS]hm, no", [])),
    ("pythonic", "[get_weather(city='Bonn', days=3), f()]", ("", [("get_weather", '{"city": "Bonn", "days": 3}'), ("f", "{}")])),
    (
        "pythonic",
        '[math.sqrt(x=-1.5, opts={"a": [1, None, True]}, s="a]b\\"")]',
        ("", [("math.sqrt", '{"x": -1.5, "opts": {"a": [1, null, true]}, "s": "a]b\\""}')]),
    ),
    ("pythonic", "[1] a citation", ("[1] a citation", [])),
    ("pythonic", "[link](http://x)", ("[link](http://x)", [])),
    ("pythonic", "[f(__import__('os').system('x'))]", ("[f(__import__('os').system('x'))]", [])),
    ("pythonic", "[f(a=open('x'))]", ("[f(a=open('x'))]", [])),
    ("pythonic", "[f(a=1", ("[f(a=1", [])),
    ("array", '[{"name": "f", "parameters": {"a": 1}}, {"name":"add","parameters":{}}]', ("", [("f", '{"a": 1}'), ("add", "{}")])),
    ("array", '[{"name": "f", "parameters": {"a": 1}}, {"na', ("", [("f", '{"a": 1}')])),
    ("array", "no array", ("no array", [])),
    ("named", ' {"a": 1}', ("", [("f", '{"a": 1}')])),
    ("named", "", ("", [])),
]


@pytest.mark.parametrize(("kind", "text", "want"), CASES)
def test_whole_text(kind: str, text: str, want: Result) -> None:
    assert run(make(kind), [text]) == want


@pytest.mark.parametrize(("kind", "text", "want"), CASES)
def test_every_split_point_and_single_characters(kind: str, text: str, want: Result) -> None:
    assert run(make(kind), text) == want
    for i in range(len(text) + 1):
        assert run(make(kind), [text[:i], text[i:]]) == want, i


_TAGS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
_SIGNS = ["{", "}", "[", "]", '"', "\\", ":", ",", ";", " ", "\n", "f(", ")", "a=1", "null", "1", "é", "name", '"f"']
_KEYS = ['"name"', '"arguments"', '"parameters"']
_CALLS = ['{"name": "f", "arguments": {"a": 1}}', '{"name":"add","parameters":{"x":[]}}']
_SCRAPS = st.sampled_from([*_TAGS, *_SIGNS, *_KEYS, *_CALLS])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*PARSERS, "array", "named"]), st.lists(_SCRAPS, max_size=14), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_any_chunking_gives_the_same(kind: str, scraps: list[str], sizes: list[int]) -> None:
    text, chunks, at = "".join(scraps), [], 0
    while at < len(text):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[at : at + size])
        at += size
    assert run(make(kind), chunks) == run(make(kind), [text])


def think(make_parser: Callable[[], ThinkParser], chunks: Iterable[str]) -> tuple[str, str]:
    """(reasoning, content)."""
    parser = make_parser()
    found = [parser.feed(c) for c in chunks] + [parser.finish()]
    return "".join(r for r, _ in found), "".join(c for _, c in found)


@pytest.mark.parametrize(
    ("inside", "text", "want"),
    [
        (True, "a b</think>\n\nc", ("a b", "\n\nc")),
        (True, "<think>\na</think>c", ("\na", "c")),
        (True, "never ends </thin", ("never ends </thin", "")),
        (False, "<think>a</think>b</think>", ("a", "b</think>")),
        (False, "\n<think>a</think>", ("a", "")),
        (False, "no <think>tags</think>", ("", "no <think>tags</think>")),
        (False, "<thin", ("", "<thin")),
        (True, "", ("", "")),
    ],
)
def test_think_tags(inside: bool, text: str, want: tuple[str, str]) -> None:
    def fresh() -> ThinkParser:
        return ThinkParser(inside)

    assert think(fresh, [text]) == want
    assert think(fresh, text) == want
    for i in range(len(text) + 1):
        assert think(fresh, [text[:i], text[i:]]) == want


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "a"]), max_size=12), st.integers(1, 5))
def test_think_any_chunking(inside: bool, scraps: list[str], size: int) -> None:
    text = "".join(scraps)
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert think(lambda: ThinkParser(inside), chunks) == think(lambda: ThinkParser(inside), [text])


def test_arguments_arrive_while_they_are_written() -> None:
    parser = make("hermes")
    parser.feed('<tool_call>{"name": "f", "arguments": {"text": "')
    pieces = parser.feed("long value")
    assert [p.arguments for p in pieces if isinstance(p, ToolDelta)] == ["long value"]


def test_real_json_survives() -> None:
    value = {"s": 'quotes " and \\ and }{][', "n": None, "deep": [[[{"a": [1, 2.5, False]}]]], "u": "ünï"}
    for indent in (None, 2):
        call = json.dumps({"name": "f", "arguments": value}, indent=indent)
        content, calls = run(make("hermes"), f"<tool_call>{call}</tool_call>")
        assert content == "" and json.loads(calls[0][1]) == value
