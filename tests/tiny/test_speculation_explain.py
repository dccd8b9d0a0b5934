"""``presage explain``: the decision log tells of every request what it got, what was drafted for it, and what it waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from presage.engine.explain import History, history, requests
from presage.engine.replay import read_frames
from presage.serve.cli import main
from presage.serve.cli_explain import _words
from presage.serve.explained import REJECTED, _text
from tests.tiny.speculation_work import CALLS, GREEDY, LENGTHS, LINES, LOOK_UPS, collect, engine, params, send


class Logged(NamedTuple):
    """A run and its log."""

    folder: Path
    outputs: dict[str, list[Any]]
    stats: dict[str, Any]

    def history(self, name: str) -> History:
        return history(read_frames(self.folder), name)


def run(folder: Path, level: str) -> Logged:
    """Few seats, few blocks, drafts from two drafters, and all kinds of requests."""
    llm = engine(
        {**LOOK_UPS["merged"], "length": LENGTHS["fixed"]}, max_num_seqs=6, num_gpu_blocks_override=10, max_num_batched_tokens=64,
        decision_log=str(folder), decision_log_level=level,
    )  # fmt: skip
    results = llm.generate([p for p, _ in GREEDY], [s for _, s in GREEDY])
    wishes = {"none": {"method": "none"}, "two": {"num_speculative_tokens": 2}, "free": None}
    collect(llm, [send(llm, LINES, params(max_tokens=30), name, draft=wish) for name, wish in wishes.items()])
    out = Logged(folder, {r.request_id: r.outputs for r in results}, llm.stats())
    llm.close()
    return out


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    yield run(tmp_path_factory.mktemp("log"), "tokens")


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_every_token_and_every_draft_is_told(logged: Logged) -> None:
    drafted = accepted = 0
    for name in requests(read_frames(logged.folder)):
        found = logged.history(name)
        for index, branch in found.branches.items():
            drafted += sum(len(r.parent) for r in branch.ran)
            accepted += sum(len(r.path) for r in branch.ran)
            if name in logged.outputs:
                output = logged.outputs[name][index]
                assert [i for r in branch.ran for i in r.ids] == output.token_ids
                assert branch.finish == output.finish_reason
            for r in branch.ran:
                assert r.ids[: len(r.path)] == [int(r.token[node]) for node in r.path]
                assert r.seconds > 0 and r.now >= found.arrival
    assert drafted == logged.stats["spec_num_draft_tokens"] > 100
    # What a stop cut off was accepted all the same, as far as the counters go.
    assert 50 < accepted <= logged.stats["spec_num_accepted_tokens"]


def test_every_delay_has_a_reason(logged: Logged) -> None:
    causes, reasons = Counter[str](), Counter[str]()
    for name in logged.outputs:
        for branch in logged.history(name).branches.values():
            for delay in branch.delays:
                assert delay.until is not None and delay.until >= delay.since
                causes[delay.cause] += 1
                reasons += delay.reasons
    assert causes["preempted"] == logged.stats["preemptions"] > 0
    assert causes["grammar"] == sum(s.structured_outputs is not None for _, s in GREEDY)
    assert any("given up" in text for text in reasons)
    assert any("seats" in text or "KV blocks were free" in text for text in reasons)
    assert any(text.startswith("behind req-") for text in reasons)


def test_the_coloured_text_is_the_output(logged: Logged) -> None:
    rejected = 0
    for name, outputs in logged.outputs.items():
        found = logged.history(name)
        show = _words(found, "")
        for index, branch in found.branches.items():
            text = _text(branch.ran, show, colours=True)
            lost = [s for s in text.spans if s.style == REJECTED]
            plain, rejected = text.plain, rejected + len(lost)
            for s in reversed(lost):
                plain = plain[: s.start] + plain[s.end :]
            assert plain.startswith(outputs[index].text)
            kept = {str(s.style) for s in text.spans} - {REJECTED, ""}
            assert kept <= {"green", "cyan", "bright_magenta"}  # the last: what a grammar forced
    assert rejected > 10


def test_a_request_is_explained(logged: Logged, capsys: pytest.CaptureFixture[str]) -> None:
    log = ("--decision-log", str(logged.folder))
    assert command("explain", *log) == 0
    assert "free" in capsys.readouterr().out
    assert command("explain", "free", *log) == 0
    told = capsys.readouterr().out
    assert "30 tokens in" in told and "[ Callable" in told and "all that the length policy asked for" in told
    assert command("explain", "two", *log, "--steps", "-1") == 0
    assert "(the request's own limit)" in capsys.readouterr().out
    assert command("explain", "none", *log) == 0
    assert "none: the request wants no drafts" in capsys.readouterr().out


def test_mistakes_are_named(logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("explain", "req-", "--decision-log", str(logged.folder)) == 1
    assert f"{len(logged.outputs)} requests of this log match 'req-'" in capsys.readouterr().err
    assert command("explain", "nobody", "--decision-log", str(logged.folder)) == 1
    assert "0 requests" in capsys.readouterr().err
    assert command("explain", "x", "--decision-log", str(tmp_path)) == 1
    assert "no decision log" in capsys.readouterr().err


def test_without_ids_there_are_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(tmp_path, "shape")
    name = next(n for (p, s), n in zip(GREEDY, made.outputs, strict=True) if p == CALLS and s.n == 2)
    found = made.history(name)
    assert sorted(found.branches) == [0, 1] and sum(r.new for r in found.branches[0].ran) == 24
    assert not any(len(r.token) or r.ids for b in found.branches.values() for r in b.ran)
    assert command("explain", name, "--decision-log", str(tmp_path), "--steps", "0") == 0
    told = capsys.readouterr().out
    assert "branch 1" in told and "[■" in told and "⟨□" in told
