"""Whatever a model says under a mask obeys the constraint: random choices among the allowed ids, over real schemas and hand-made ones."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator

import jsonschema
import pytest

from presage.core.errors import GrammarError
from presage.verify.grammar import GrammarCompiler, Masker
from tests.shared import shared_data
from tests.tiny.grammar_tools import S, compiler, request, tokenizer, walk


@pytest.fixture(scope="module")
def masker() -> Iterator[Masker]:
    made = compiler()
    yield Masker(made)
    made.close()


def say(masker: Masker, params: S, seed: int, most: int = 200, eager: bool = True) -> tuple[bytes, bool]:
    masker.open(0, request(params))
    text, _, finished = walk(masker, 0, random.Random(seed), most, eager)
    masker.close(0)
    return text, finished


def test_benchmark_schemas_always_validate(masker: Masker) -> None:
    with gzip.open(shared_data("jsonschemabench/schemas.jsonl.gz"), "rt") as file:
        rows = file.read().splitlines()[3::64]
    finished = supported = 0
    for n, row in enumerate(rows):
        schema = json.loads(row)["schema"]
        try:
            text, done = say(masker, S(json=schema), n, 80)
        except GrammarError:
            continue
        supported += 1
        finished += done
        if done:
            jsonschema.validators.validator_for(schema)(schema).validate(json.loads(text))
    assert supported >= 0.7 * len(rows)
    assert finished


TRICKY = [
    {"type": "string", "maxLength": 6},
    {"type": "string", "minLength": 2, "maxLength": 5, "pattern": "^[a-z]+$"},
    {"type": "string", "pattern": 'x"\\\\y|^z$', "maxLength": 9},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": -5.5, "exclusiveMaximum": 3},
    {"type": "number", "minimum": 0, "maximum": 2},
    {"type": "integer", "multipleOf": 7, "minimum": 20, "maximum": 90},
    {"allOf": [{"type": "integer"}, {"minimum": 3}], "maximum": 9},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer", "maximum": 40}}, "minimum": 30},
    {"enum": ["a", "bbb", 7], "minLength": 2},
    {"type": "object", "required": ["z"], "properties": {"a": {"type": "boolean"}}, "additionalProperties": {"type": "null"}},
    {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "minProperties": 2, "maxProperties": 2, "type": "object"},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"oneOf": [{"type": "integer", "maximum": 3}, {"enum": ["x"]}]},
    {"oneOf": [{"properties": {"k": {"const": c}, c: {"type": "null"}}, "required": ["k", c], "type": "object"} for c in "pq"]},
    {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 1, "uniqueItems": True},
    {"type": "object", "patternProperties": {"^a": {"type": "null"}, "b$": {"type": ["null", "integer"]}}, "maxProperties": 3},
    {"type": "object", "propertyNames": {"enum": ["u", "v"]}, "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "properties": {"n": {"$ref": "#"}, "v": {"type": "boolean"}}, "required": ["v"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "dependentRequired": {"a": ["b"]}},
    {"type": ["string", "null"], "maxLength": 2, "format": "textarea"},
]


@pytest.mark.parametrize("schema", TRICKY, ids=lambda s: json.dumps(s)[:60])
def test_keywords_that_the_engine_alone_would_ignore(masker: Masker, schema: dict) -> None:
    check = jsonschema.Draft202012Validator(schema)
    finished = 0
    for seed in range(12):
        text, done = say(masker, S(json=schema), seed, 150, eager=seed % 2 == 0)
        finished += done
        if done:
            check.validate(json.loads(text))
    assert finished


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("not", {"not": {"type": "integer"}}),
        ("if", {"if": {"required": ["a"]}, "then": {"required": ["b"]}}),
        ("uniqueItems", {"type": "array", "uniqueItems": True, "items": {}}),
        ("contains", {"type": "array", "contains": {"type": "string"}}),
        ("dependentSchemas", {"dependentSchemas": {"a": {}}}),
        ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 0}]}),
        ("multipleOf", {"type": "number", "multipleOf": 0.01}),
        ("$ref", {"$ref": "http://example.com/schema"}),
        ("$ref", {"$ref": "#/$defs/missing"}),
        ("$ref", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        ("format", {"type": "string", "format": "idn-email"}),
        ("type", {"type": "float"}),
        ("minLength", {"type": "string", "minLength": 10**9}),
        ("minItems", {"type": "array", "minItems": -1}),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(masker: Masker, keyword: str, schema: dict) -> None:
    with pytest.raises(GrammarError) as caught:
        masker.compiler.check(S(json={"type": "object", "properties": {"deep": schema}, "required": ["deep"]}))
    assert keyword in caught.value.message or caught.value.details.get("keyword") == keyword
    assert caught.value.status == 400


def test_keyword_names_as_data_are_not_keywords(masker: Masker) -> None:
    schema = {
        "type": "object",
        "title": "not",
        "properties": {"not": {"enum": ["if", {"contains": 1}]}, "if": {"const": {"uniqueItems": True}, "default": {"not": 1}}},
        "required": ["not", "if"],
        "x-own": {"not": 1},
    }
    text, done = say(masker, S(json=schema), 1)
    assert done
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("pattern", [r"[a-c]{3}-\d{1,3}", r"^(yes|no)!?$", r"(?:0x)?[0-9A-F]{2,4}", r"é+|[^\x00-\x7f]{2}", r"a\.b\[\]"])
def test_regex_is_a_full_match(masker: Masker, pattern: str) -> None:
    done = 0
    for seed in range(8):
        text, finished = say(masker, S(regex=pattern), seed, 40, eager=False)
        done += finished
        assert not finished or re.fullmatch(pattern.strip("^$"), text.decode())
    assert done >= 4


@pytest.mark.parametrize("pattern", ["(?=a)b", "(a)\\1", "\\bfoo\\b", "(?i)a", "a{1,", "(", "[z-a]", "\\p{L}", "*a"])
def test_a_regex_that_would_be_read_differently_is_refused(masker: Masker, pattern: str) -> None:
    if pattern == "a{1,":  # a brace that is no count stands for itself
        assert say(masker, S(regex=pattern), 0) == (b"a{1,", True)
        return
    with pytest.raises(GrammarError, match="position"):
        masker.compiler.check(S(regex=pattern))


def test_choice_gives_one_of_the_strings(masker: Masker) -> None:
    choice = ["yes", "no", 'may "be"\n\\', "ja é 😀", "yes, but"]
    said = {say(masker, S(choice=choice), seed, eager=False)[0].decode() for seed in range(40)}
    assert said == set(choice)


@pytest.mark.parametrize("name", ["chess", "json"])
def test_gbnf_grammars(masker: Masker, name: str) -> None:
    text, _ = say(masker, S(grammar=shared_data(f"gbnf_grammars/{name}.gbnf").read_text()), 5, 40)
    head = {"chess": rb"1\. ", "json": rb"\{"}[name]
    assert re.match(head, text)


def test_whitespace_only_when_asked_and_then_capped(masker: Masker) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}
    assert {say(masker, S(json=schema), seed)[0] for seed in range(5)} == {b'{"a":1,"b":2}'}
    loose = [say(masker, S(json=schema, any_whitespace=True), seed)[0] for seed in range(8)]
    assert any(re.search(rb"\s", t) for t in loose)
    assert not any(re.search(rb"\s{3}", t) for t in loose)


def test_a_sentencepiece_vocabulary() -> None:
    path = shared_data("tokenizers/tinyllama/tokenizer.json")
    made = GrammarCompiler(path, 32000, [2])
    masker, schema = Masker(made), {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
    for seed in range(3):
        text, done = say(masker, S(json=schema), seed, 60)
        assert done
        jsonschema.validate(json.loads(text), schema)
    made.close()


def test_numbers_are_of_bounded_length_and_reach_every_double(masker: Masker) -> None:
    from tests.tiny.grammar_tools import new_ids

    for schema in ({"type": "number"}, {"type": "integer"}, {}, {"type": "number", "minimum": 0}, {"type": "integer", "maximum": 7}):
        masker.open(0, request(S(json={"type": "array", "items": schema})))
        masker.advance(new_ids(0, tokenizer().encode("[-" if "minimum" not in schema else "[", add_special_tokens=False)))
        digit = tokenizer().encode("9", add_special_tokens=False)
        count = 0
        while count < 60 and masker.tracks[0].matcher.accept_token(digit[0]):
            count += 1
        assert 14 <= count <= 18
    doubles = S(json={"type": "array", "items": {"type": "number"}})
    texts = ["[" + ",".join(repr(v).replace("e+", "e") for v in (5e-324, 1.7976931348623157e308, 0.1, -2.5, 123456789.12345678)) + "]"]
    assert all(masker.compiler.compile(doubles) and accepts(masker, doubles, t) for t in texts)


def accepts(masker: Masker, params: S, text: str) -> bool:
    masker.open(0, request(params))
    matcher = masker.tracks[0].matcher
    return bool(matcher.accept_string(text) and matcher.is_completed())


def test_special_tokens_are_never_text(masker: Masker) -> None:
    from tests.tiny.grammar_tools import mask_of

    masker.open(0, request(S(json={"type": "string"})))
    special = sorted(tokenizer().special_ids)
    assert special
    assert not mask_of(masker, 0)[special].any()
