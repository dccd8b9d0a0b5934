"""Text from emissions does not depend on how ids were grouped into emissions, nor on repeats after a restart."""

from __future__ import annotations

from functools import cache

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import GrammarError, PresageError
from presage.core.request import Emission, Request, TokenLogprobs
from presage.core.sampling_params import SamplingParams
from presage.serve.errors import error_body, error_response, from_emission
from presage.serve.generate import Branch, Delta
from presage.serve.protocol.chat import Tool
from presage.serve.tool_choice import array_schema
from presage.tokenize import Tokenizer
from tests.http.echo import MODEL


@cache
def tokenizer() -> Tokenizer:
    """The bundled tokenizer."""
    return Tokenizer.load(str(MODEL))


def run(ids: list[int], sizes: list[int], sampling: SamplingParams, finish: str, repeat: bool) -> Delta:
    """Everything one branch says when ``ids`` come in emissions of ``sizes``; ``repeat`` sends each emission with its predecessor again."""
    branch = Branch(tokenizer(), Request(id="x", prompt=np.array([5, 6], np.int32), sampling=sampling), tokenizer().eos_ids)
    whole, at, k = Delta(0, "", [], []), 0, 0
    while at < len(ids):
        size = sizes[k % len(sizes)]
        start = max(0, at - 2) if repeat else at
        part = ids[start : at + size]
        last = at + size >= len(ids)
        logprobs = [TokenLogprobs(i, -1.0, 1, [], []) for i in part]
        delta = branch.push(Emission("x", 0, start, part, logprobs, finish=finish if last else ""))
        if delta is not None:
            whole.add(delta)
        at, k = at + size, k + 1
    assert branch.n == len(whole.ids) == len(whole.logprobs)
    return whole


_TEXT = st.lists(st.sampled_from(["ab", "abc", " ", "stop", "st", "op", "é", "你好", "😀", "\n", "<", "END"]), max_size=25).map("".join)
_STOPS = st.lists(st.sampled_from(["stop", "abcab", "é", "好", "\n\n", "END", "a"]), max_size=3)


@settings(max_examples=200, deadline=None)
@given(_TEXT, _STOPS, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 4))
def test_grouping_does_not_matter(text: str, stops: list[str], sizes: list[int], include: bool, repeat: bool, ends: bool, least: int) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False) + ([tokenizer().eos_ids[-1]] if ends else [])
    sampling = SamplingParams(stop=list(stops), include_stop_str_in_output=include, min_tokens=least, max_tokens=1000)
    finish = "stop" if ends else "length"
    one = run(ids, [1], sampling, finish, False)
    assert run(ids, sizes, sampling, finish, repeat) == one
    if not stops and ids:
        assert one.text == (text + tokenizer().decode(ids[-1:], skip_special_tokens=True) if ends and include else text)
        assert one.ids == ids and one.finish == finish
    if least == 0 and not include and one.stop is not None:
        assert one.stop not in one.text and text.startswith(one.text)


def test_end_token_has_no_text_but_a_stop_reason_if_asked_for() -> None:
    word = tokenizer().encode(" word", add_special_tokens=False)[-1]
    end = tokenizer().eos_ids[-1]
    said = tokenizer().encode("abc", add_special_tokens=False)
    assert run([*said, word], [9], SamplingParams(stop_token_ids=[word]), "stop", False).stop == word
    assert run([*said, word], [9], SamplingParams(stop_token_ids=[word]), "stop", False).text == "abc"
    shown = run([*said, end], [9], SamplingParams(skip_special_tokens=False), "stop", False)
    assert (shown.text, shown.stop) == ("abc", None)
    ignored = run([*said, end], [9], SamplingParams(skip_special_tokens=False, ignore_eos=True), "length", False)
    assert ignored.text == "abc" + tokenizer().token_text(end)


def test_errors_survive_as_plain_data() -> None:
    again = from_emission(("invalid_grammar", "bad", 400))
    assert isinstance(again, GrammarError) and error_body(again)["error"]["type"] == "invalid_request_error"
    odd = from_emission(("from_the_future", "hm", 418))
    assert isinstance(odd, PresageError) and error_response(odd).status_code == 418
    assert error_body(odd)["error"] == {"message": "hm", "type": "invalid_request_error", "param": None, "code": "from_the_future"}
    assert error_response(from_emission(("engine_dead", "gone", 503))).headers["retry-after"] == "1"


def test_references_inside_tools_still_mean_the_same() -> None:
    """Two tools define the same name differently, and one refers to itself."""

    def tool(name: str, kind: str) -> Tool:
        properties = {"p": {"$ref": "#/$defs/P"}, "more": {"$ref": "#"}}
        schema = {"type": "object", "properties": properties, "required": ["p"], "$defs": {"P": {"type": kind}}}
        return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema}})

    check = jsonschema.Draft202012Validator(array_schema([tool("a", "string"), tool("b", "integer")], True))
    for name, p, good in (("a", "x", True), ("b", 1, True), ("a", 1, False), ("b", "x", False)):
        assert check.is_valid([{"name": name, "parameters": {"p": p, "more": {"p": p}}}]) is good
    assert not check.is_valid([{"name": "a", "parameters": {"p": "x", "more": {"p": 1}}}])
    assert not check.is_valid([])


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_after_the_end(n: int) -> None:
    branch = Branch(tokenizer(), Request(id="x", prompt=np.array([5], np.int32), sampling=SamplingParams()), tokenizer().eos_ids)
    assert branch.push(Emission("x", 0, 0, [50], finish="length")) is not None
    assert branch.push(Emission("x", 0, n, [51], finish="length")) is None
