"""Streams of text: detokenisation piece by piece and stop strings, both independent of how the pieces are cut."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.tokenize import Detokenizer, StopChecker, StopStrings, Tokenizer
from tests.shared import shared_data


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Byte-level, SentencePiece-style, and one whose decoder (WordPiece) needs its neighbours."""
    folder = tmp_path_factory.mktemp("wordpiece")
    vocab = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "the", "cat", "##s", "sat", "on", "mat", "un", "##happy", "##ly"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[CLS]"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    wordpiece = Tokenizer.load(folder)
    assert wordpiece.table is None
    return [Tokenizer.load("presage-tiny"), Tokenizer.load(shared_data("tokenizers/tinyllama")), wordpiece]


def pieces(ids: list[int], rng: random.Random) -> list[list[int]]:
    out, at = [], 0
    while at < len(ids):
        n = rng.randint(1, 4)
        out.append(ids[at : at + n])
        at += n
    return out


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_concatenate_to_the_whole(three: list[Tokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(three))
    some = st.integers(0, min(300, tokenizer.vocab_size - 1)) | st.integers(0, tokenizer.vocab_size - 1)
    ids, skip = data.draw(st.lists(some, max_size=24)), data.draw(st.booleans())
    stream = Detokenizer(tokenizer, (), skip)
    text = "".join([stream.push(p) for p in pieces(ids, data.draw(st.randoms()))] + [stream.finish()])
    assert text == tokenizer.decode(ids, skip)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_after_a_prompt_it_is_the_rest_of_the_whole(three: list[Tokenizer], data: st.DataObject) -> None:
    """Prompt and output are one text cut between any two ids, in the middle of a character too."""
    tokenizer = data.draw(st.sampled_from(three[:2]))
    ids = tokenizer.encode(data.draw(st.text(max_size=20)), add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    stream = Detokenizer(tokenizer, np.array(ids[:cut], np.int32))
    text = stream.push(ids[cut:]) + stream.finish()
    head = Detokenizer(tokenizer)
    shown = head.push(ids[:cut])  # what a reader of the prompt alone sees, its unfinished character left out
    assert shown + text == tokenizer.decode(ids)


def test_characters_come_whole() -> None:
    tokenizer = Tokenizer.load("presage-tiny")
    ids = tokenizer.encode("\u65e5\u672c \U0001f389")
    stream = Detokenizer(tokenizer)
    deltas = [stream.push([i]) for i in ids]
    assert "\ufffd" not in "".join(deltas)
    assert [d for d in deltas if d] == ["\u65e5", "\u672c", " ", "\U0001f389"]
    half = Detokenizer(tokenizer)
    half.push(ids[:2])
    assert half.finish() == "\ufffd"
    kept = Detokenizer(tokenizer)
    kept.push(ids[:2])
    state = kept.save()
    first = kept.push(ids[2:])
    kept.restore(state)
    assert kept.push(ids[2:]) == first == "\u65e5\u672c \U0001f389"


def test_leading_space_belongs_to_the_text_after_a_prompt() -> None:
    tokenizer = Tokenizer.load(shared_data("tokenizers/tinyllama"))
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert Detokenizer(tokenizer, [1]).push(hello) == "Hello"
    assert Detokenizer(tokenizer, [1, *hello]).push(hello) == " Hello"
    assert Detokenizer(tokenizer, [1], skip_special_tokens=False).push(hello) == " Hello"


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The rule by brute force: the match that ends first, the longest of those."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=6), st.text("abc", max_size=40), st.randoms(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_stop_strings_by_brute_force(stops: list[str], text: str, rng: random.Random, include: bool) -> None:
    checker, shown, hit, at = StopChecker(stops, include), "", None, 0
    while at < len(text) and hit is None:
        n = rng.randint(1, 6)
        emitted, hit = checker.push(text[at : at + n])
        shown += emitted
        at += n
    expected, stop = first_stop(text, stops)
    assert hit == stop
    if hit is None:
        # Held back is exactly the longest end that could begin a stop string.
        held = max((k for k in range(len(text) + 1) if any(s.startswith(text[len(text) - k :]) for s in stops)), default=0)
        assert len(text) - len(shown) == held
        assert shown + checker.flush() == text
    else:
        assert shown == expected + (hit if include else "")
        assert checker.push("more") == ("", hit)
        assert checker.flush() == ""


def test_unarmed_matches_are_passed_over() -> None:
    checker = StopChecker(["END"])
    assert checker.push("xEND", armed=False) == ("xEND", None)
    assert checker.push("yEN") == ("y", None)
    assert checker.push("D") == ("", "END")
    longer = StopChecker(["END", "ENDING", "D!"])
    assert longer.push("END", armed=False) == ("", None)
    assert longer.push("I", armed=False) == ("", None)
    assert longer.push("x") == ("ENDIx", None)


def test_many_long_stops_cost_a_step_per_character() -> None:
    """Every prefix overlaps every other: the automaton's failure links must not multiply the work."""
    stops = ["a" * n + "b" for n in range(1, 65)]
    checker = StopChecker(stops)
    steps = 0
    plain = checker._automaton.step

    def counted(state: int, ch: str) -> int:
        nonlocal steps
        steps += 1
        return plain(state, ch)

    checker._automaton.step = counted  # type: ignore[method-assign]
    assert checker.push("a" * 20_000)[1] is None
    assert steps == 20_000
    assert checker.push("b")[1] == "a" * 64 + "b"


def request(tokenizer: Tokenizer, stop: list[str], **sampling: Any) -> Request:
    return Request(id="r", prompt=np.array(tokenizer.encode("A prompt."), np.int32), sampling=SamplingParams(stop=stop, **sampling))


def test_companion_keeps_up_to_the_completing_id() -> None:
    tokenizer = Tokenizer.load("presage-tiny")
    ids = tokenizer.encode("one two; three; four")
    companion = StopStrings(tokenizer)
    req = request(tokenizer, ["; th", "zzz"])
    for cut in range(1, len(ids)):
        companion.open(3, req)
        kept, stop = [], None
        for part in (ids[:cut], ids[cut:]):
            if stop is None:
                keep, stop = companion.check(3, part)
                kept += part[:keep]
        assert stop == "; th"
        assert "; th" in tokenizer.decode(kept)
        assert "; th" not in tokenizer.decode(kept[:-1])
        companion.close(3)
    assert companion.check(3, ids) == (len(ids), None)


def test_companion_ignores_requests_without_stops() -> None:
    tokenizer = Tokenizer.load("presage-tiny")
    companion = StopStrings(tokenizer)
    companion.open(0, request(tokenizer, []))
    assert 0 not in companion
    assert companion.check(0, [5, 6, 7]) == (3, None)


def test_companion_rewinds_forks_and_resumes() -> None:
    tokenizer = Tokenizer.load("presage-tiny")
    companion, req = StopStrings(tokenizer), request(tokenizer, ["stop here"])
    n, ids = len(req.prompt), tokenizer.encode("please stop here now")
    whole, rest = next(k for k in range(len(ids)) if "stop here" in tokenizer.decode(ids[: k + 1])), tokenizer.encode(" x")
    companion.open(0, req)
    assert companion.check(0, ids[:whole])[1] is None
    assert companion.length(0) == n + whole
    companion.fork(0, 1, req)
    # A wrong guess after the prefix is taken back; the right id then completes the string on both slots.
    assert companion.check(0, rest)[1] is None
    companion.rewind(0, n + whole)
    assert companion.check(0, ids[whole:]) == (1, "stop here")
    assert companion.check(1, ids[whole:]) == (1, "stop here")
    resumed = Request(id="r", prompt=req.prompt, sampling=req.sampling, emitted=np.array(ids[:whole], np.int32))
    companion.open(2, resumed)
    assert companion.length(2) == n + whole
    assert companion.check(2, ids[whole:]) == (1, "stop here")


def test_min_tokens_delays_stop_strings() -> None:
    tokenizer = Tokenizer.load("presage-tiny")
    ids = tokenizer.encode("a;b;c;d")
    first = next(k for k in range(len(ids)) if ";" in tokenizer.decode(ids[: k + 1]))
    companion = StopStrings(tokenizer)
    companion.open(0, request(tokenizer, [";"]))
    assert companion.check(0, ids) == (first + 1, ";")
    companion.open(0, request(tokenizer, [";"], min_tokens=first + 1))
    keep, stop = companion.check(0, ids)
    assert stop == ";"
    assert keep > first + 1
    assert tokenizer.decode(ids[:keep]).count(";") == 2
