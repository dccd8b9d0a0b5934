"""Compiling in the background: caching, cancelling, limits."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from presage.core.errors import GrammarError
from presage.verify.grammar import GrammarCompiler, spec_of
from tests.tiny.grammar_tools import S, compiler


@pytest.fixture(scope="module")
def made() -> Iterator[GrammarCompiler]:
    out = compiler(timeout=3.0)
    yield out
    out.close()


class Box:
    """What the worker thread told about one request."""

    def __init__(self) -> None:
        self.told: list[GrammarError | None] = []
        self.came = threading.Event()

    def done(self, error: GrammarError | None) -> None:
        self.told.append(error)
        self.came.set()


def test_submit_calls_back_once_and_the_result_is_taken(made: GrammarCompiler) -> None:
    box, params = Box(), S(regex="[a-z]+!")
    made.submit("one", params, box.done)
    assert box.came.wait(60)
    assert box.told == [None]
    first = made.take("one", params)
    assert made.take("other", S(regex="[a-z]+!")) is first  # same spec: from the cache
    assert made.compile(S(regex="[a-z]+?!!")) is not first


@pytest.mark.parametrize("params", [S(json={"not": {}, "type": "null"}), S(grammar='root ::= "a" nowhere')], ids=["early", "in the child"])
def test_a_bad_grammar_is_told_as_a_400(made: GrammarCompiler, params: S) -> None:
    box = Box()
    made.submit("bad", params, box.done)
    assert box.came.wait(100)
    (error,) = box.told
    assert error is not None
    assert (error.code, error.status) == ("invalid_grammar", 400)
    assert "'not'" in error.message or "nowhere" in error.message


def test_cancel_in_flight_says_nothing(made: GrammarCompiler) -> None:
    gone, stays, hold = Box(), Box(), threading.Event()
    made._small.submit(hold.wait)  # the worker is busy, so that the request is still waiting
    made.submit("gone", S(regex="x{3}"), gone.done)
    made.cancel("gone")
    made.submit("stays", S(regex="y{3}"), stays.done)
    hold.set()
    assert stays.came.wait(60)
    assert not gone.told
    assert "gone" not in made._ready and "gone" not in made._waiting


def test_a_slow_grammar_is_stopped_and_others_are_not_delayed(made: GrammarCompiler) -> None:
    slow, quick = Box(), Box()
    keys = {f"k{i}": {"type": "integer"} for i in range(3000)}
    made.submit("slow", S(json={"type": "object", "properties": keys}), slow.done)
    made.submit("quick", S(regex="q{5}"), quick.done)
    assert quick.came.wait(60)
    assert not slow.told
    assert slow.came.wait(100)
    assert slow.told[0] is not None
    assert "too much memory or more than 3 s" in slow.told[0].message


HOSTILE = {
    "repeats": S(regex="(a{1,1000}){1,1000}"),
    "groups": S(regex="(" * 5000 + ")" * 5000),
    "count": S(json={"type": "string", "minLength": 10**9}),
    "items": S(json={"type": "array", "items": {}, "minItems": 10**9}),
    "deep text": S(json='{"items":' * 10_000 + "{}" + "}" * 10_000),
    "deep value": S(json=json.loads('{"items":' * 400 + "{}" + "}" * 400)),
    "loop": S(json={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "choices": S(json={"anyOf": [{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"$ref": "#"}]}),
    "branches": S(json={"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(9)]} for i in range(9)], "type": "object"}),
    "backtrack": S(json={"patternProperties": {"^((a+)+)+$": {}}, "properties": {"a" * 60 + "X": {"type": "null"}}, "type": "object"}),
    "left": S(grammar='root ::= root "a"'),
    "open": S(grammar="root ::= " + "(" * 9000),
    "long": S(grammar='root ::= "' + "a" * 100_000 + '"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_end_soon(made: GrammarCompiler, name: str) -> None:
    try:
        assert made.compile(HOSTILE[name]) is not None
        assert name in ("repeats", "backtrack")
    except GrammarError as error:
        assert error.message and name not in ("repeats", "backtrack")


def test_one_schema_never_changes_another() -> None:
    made = compiler()
    plain = S(json={"type": "object", "properties": {"a": {"type": "string"}}})
    before = spec_of(plain)
    for other in (S(json=plain.json, any_whitespace=True), S(json={"type": "object", "properties": {"a": {"type": "null"}}}), S(json="{}")):
        assert spec_of(other).key != before.key
        assert made.compile(other) is not made.compile(plain)
    assert spec_of(plain) == before
    made.close()


def test_the_cache_is_bounded() -> None:
    made = compiler()
    made.cache_bytes = 1
    first = made.compile(S(regex="a"))
    made.compile(S(regex="b"))
    assert len(made._cache) == 1
    assert made.compile(S(regex="a")) is not first
    made.close()


def test_checking_needs_no_tokenizer_and_takes_strings_or_objects() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert spec_of(S(json=schema)) == spec_of(S(json=json.dumps(schema)))
    with pytest.raises(GrammarError, match="not JSON"):
        spec_of(S(json="{"))
    with pytest.raises(GrammarError, match="cannot be satisfied"):
        spec_of(S(json=False))
