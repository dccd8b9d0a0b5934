"""The offline replay: what counts as accepted, learning from past requests, length policies, and the command."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presage.bench.arctic import ArcticDrafter, whereabouts
from presage.bench.draft import accepted_path, learn, replay
from presage.bench.machine import Machine
from presage.bench.recordings import Columns, Recording, recordings
from presage.core.errors import CheckpointError, ConfigError
from presage.core.plan import Draft, Grants
from presage.core.protocols import EngineView
from presage.draft.length import make_length
from presage.draft.registry import make_drafter
from presage.draft.suffix import SuffixDrafter


def templated(count: int, seed: int) -> list[Recording]:
    """Outputs of the same five phrases with one free word between."""
    rng = np.random.default_rng(seed)
    phrases = np.arange(100, 150).reshape(5, 10)
    out = []
    for _ in range(count):
        words = rng.integers(0, 50, 5)
        output = np.concatenate([np.append(p, w) for p, w in zip(phrases, words, strict=True)])
        out.append(Recording(rng.integers(0, 50, 30).astype(np.int32), output.astype(np.int32)))
    return out


def test_accepted_path_follows_the_tree() -> None:
    token, parent = [5, 6, 7, 8, 9], [-1, 0, 0, 2, 3]
    assert accepted_path(token, parent, [5, 7, 8, 1]) == [0, 2, 3]
    assert accepted_path(token, parent, [5, 7]) == [0, 2]
    assert accepted_path(token, parent, [6]) == []
    assert accepted_path(token, parent, []) == []


def test_learning_raises_tokens_per_step_and_counts_add_up() -> None:
    rows = templated(12, 0)
    cold, warm = SuffixDrafter(16, 24, 0), SuffixDrafter(16, 24)
    learn(warm, rows[:8])
    a, b = replay(cold, rows[8:]), replay(warm, rows[8:])
    for out in (a, b):
        assert out.tokens == sum(len(r.output) - 1 for r in rows[8:])
        assert out.tokens == out.steps + out.accepted <= out.steps + out.drafted
        assert sum(out.position) == out.accepted
    assert a.figures()["tokens_per_step"] < 1.2
    assert b.figures()["tokens_per_step"] > 2.5


def test_tokens_do_not_depend_on_concurrency_without_shared_memory() -> None:
    rows = templated(6, 1)
    one, four = (replay(SuffixDrafter(8, 16, 0), rows, concurrency=n, cap=8) for n in (1, 4))
    assert (one.steps, one.drafted, one.accepted) == (four.steps, four.drafted, four.accepted)
    assert four.seconds < one.seconds  # fewer, larger steps


@pytest.mark.parametrize("method", ["suffix", "ngram", "lookahead"])
def test_any_host_drafter_under_a_fixed_length(method: str) -> None:
    rows = templated(6, 2)
    out = replay(make_drafter(method, {"num_speculative_tokens": 4}), rows, cap=4, length=make_length("fixed"))
    assert out.requests == 6
    assert out.tokens == out.steps + out.accepted
    assert out.drafted <= 4 * out.steps


def test_same_drafts_as_arctic_inference_on_paths() -> None:
    pytest.importorskip("arctic_inference")
    rows = templated(10, 3)
    ours, theirs = SuffixDrafter(16, 24), ArcticDrafter(16, 24, -1)
    a, b = replay(ours, rows, cap=16), replay(theirs, rows, cap=16)
    assert (a.steps, a.drafted, a.accepted, a.position) == (b.steps, b.drafted, b.accepted, b.position)


def test_length_policies_see_a_machine() -> None:
    """Where rows are free marginal verifies all that is drafted, where they are dear next to nothing; either way it learns on the way."""
    rows = templated(20, 5)
    outs = {}
    for row_ms in (0.01, 20.0):
        drafter = SuffixDrafter(16, 24)
        learn(drafter, templated(8, 6))
        outs[row_ms] = replay(drafter, rows, length=make_length("marginal"), machine=Machine(10.0, row_ms))
        assert outs[row_ms].tokens == outs[row_ms].steps + outs[row_ms].accepted
    assert outs[0.01].figures()["speedup"] > 2
    assert 0.95 < outs[20.0].figures()["speedup"] < 1.3
    assert outs[20.0].verified < outs[0.01].verified


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ConfigError, match="concurrency"):
        replay(SuffixDrafter(8), templated(2, 0), concurrency=0)

    class Passes(SuffixDrafter):
        def propose(self, view: EngineView, grants: Grants) -> Generator[Any, Any, Draft]:
            yield None
            return Draft.none(len(grants))

    with pytest.raises(ConfigError, match="forward passes"):
        replay(Passes(8), templated(2, 0))


def test_recordings_of_ids_and_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt_token_ids": [1, 2], "token_ids": [3, 4]}, {"prompt": "ab", "output": "cd"}, {"prompt": "ab", "output": "c"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert pairs(path) == [([1, 2], [3, 4]), ([97, 98], [99, 100])]
    assert len(pairs(path, limit=1)) == 1
    with pytest.raises(ConfigError, match="line 2: holds text, which needs a tokenizer"):
        list(recordings(path))
    for bad in ("{", "[1]", '{"prompt": "a"}', '{"prompt": "a", "token_ids": [1, -1]}', '{"prompt": "a", "token_ids": [[1]]}'):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(ConfigError, match="line 1"):
            pairs(path)
    with pytest.raises(CheckpointError):
        pairs(tmp_path / "none.jsonl")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(CheckpointError):
        pairs(tmp_path / "bad.gz")


def test_recordings_by_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    calls = [{"name": "f"}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "assistant", "content": "ok"}]
    rows = [{"kind": "a", "in": "ab", "out": "cd", "talk": turns}, {"kind": "b", "in": "xy", "out": [1, 2], "talk": []}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert pairs(path, columns=Columns("in", "out")) == [([97, 98], [99, 100]), ([120, 121], [1, 2])]
    assert pairs(path, columns=Columns("in", "out", where="kind=b")) == [([120, 121], [1, 2])]
    (_, first), (before, second) = pairs(path, columns=Columns(messages="talk"))
    assert "".join(map(chr, first)) == json.dumps(calls)
    assert "".join(map(chr, before)) == f"\nuser: q\nassistant: {json.dumps(calls)}"
    assert second == [ord("o"), ord("k")]
    with pytest.raises(ConfigError, match="line 1: a conversation must be"):
        pairs(path, columns=Columns(messages="in"))
    table = tmp_path / "rows.csv"
    table.write_text('question,query\n"two\nlines",select\n', encoding="utf-8")
    assert pairs(table, columns=Columns("question", "query")) == [([ord(c) for c in "two\nlines"], [ord(c) for c in "select"])]


def pairs(path: Path, limit: int = -1, columns: Columns | None = None) -> list[tuple[list[int], list[int]]]:
    found = recordings(path, lambda text: [ord(c) for c in text], limit, columns)
    return [(r.prompt.tolist(), r.output.tolist()) for r in found]


def written(path: Path, rows: list[Recording]) -> str:
    lines = [json.dumps({"prompt_token_ids": r.prompt.tolist(), "token_ids": r.output.tolist()}) for r in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def command(*words: str) -> None:
    """The command as a shell runs it."""
    cli = pytest.importorskip("presage.serve.cli")
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "draft", *words])
    assert end.value.code in (0, 1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path / "rows.jsonl", templated(8, 4)), tmp_path / "out.json"
    settings = '{"method": "suffix", "num_speculative_tokens": 8, "suffix_decoding_max_tree_depth": 16, "length": "fixed"}'
    command(path, "--speculative-config", settings, "--speculative-config", "ngram", "--train", "6", "--no-arctic", "--json", str(out))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "drafter"
    assert [line.split()[0] for line in lines] == ["suffix", "fixed:", "ngram"]
    suffix, ngram = json.loads(out.read_text(encoding="utf-8"))
    assert (suffix["name"], suffix["requests"], ngram["name"]) == ("suffix", 2, "ngram")
    assert suffix["tokens_per_step"] > 2 > ngram["tokens_per_step"]
    assert suffix["bytes_per_token"] > 0 and suffix["us_per_drafted"] > 0 and suffix["us_per_appended"] > 0


def test_the_command_complains_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "rows.jsonl", templated(2, 4))
    for words, told in (
        (["--speculative-config", "{"], "JSON"),
        (["--speculative-config", "magic"], "unknown drafter 'magic'"),
        (["--speculative-config", "none"], "names no drafter"),
        (["--train", "5"], "none is left"),
        (["--concurrency", "0", "--no-arctic"], "concurrency"),
    ):
        command(path, *words)
        assert told in capsys.readouterr().err


def test_another_python_without_arctic_inference_is_refused(tmp_path: Path) -> None:
    for python in (tmp_path / "nowhere", Path(sys.executable)):
        if importlib.util.find_spec("arctic_inference") is None:
            with pytest.raises(ConfigError, match=f"{python} has no arctic-inference"):
                ArcticDrafter(python=str(python))
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho '[[3, 1], \"/lib/arctic_inference\"]'\n", encoding="utf-8")
    other.chmod(0o755)
    with pytest.raises(ConfigError, match=r"is Python 3\.1: "):
        whereabouts(str(other))
