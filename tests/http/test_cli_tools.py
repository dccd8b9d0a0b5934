"""The commands beside ``serve``, as typed: run-batch, bench, collect-env."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from presage.serve import cli
from presage.serve.cli import main
from presage.serve.cli_batch import fault, finished_ids
from presage.serve.cli_env import variables

FAST = ["--kernels", "reference", "--max-num-seqs", "4", "--max-model-len", "128"]


def run(*words: str) -> int:
    """Status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def ask(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "presage-tiny", **body}}


LINES = [
    json.dumps(ask("text", "/v1/completions", prompt="Once upon a time", max_tokens=4, temperature=0, ignore_eos=True)),
    json.dumps(ask("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)),
    json.dumps(ask("vector", "/v1/embeddings", input="hello")),
    json.dumps(ask("nobody", "/v1/completions", prompt="x") | {"body": {"model": "nobody", "prompt": "x"}}),
    "{torn",
    json.dumps(ask("text", "/v1/completions", prompt="again")),
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_answers_every_line_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(LINES) + "\n")
    command = ["run-batch", "-i", str(source), "-o", str(target), *FAST]
    assert run(*command) == 0
    found = {(r["custom_id"], r["error"] is None): r for r in rows(target)}
    assert len(rows(target)) == len(LINES)
    assert found["text", True]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert found["chat", True]["response"]["body"]["object"] == "chat.completion"
    assert len(found["vector", True]["response"]["body"]["data"][0]["embedding"]) > 8
    assert found["nobody", False]["response"]["status_code"] == 404 and found["nobody", False]["error"]["code"] == "model_not_found"
    assert "line 5" in found[None, False]["error"]["message"] and "twice" in found["text", False]["error"]["message"]

    assert run(*command) == 1  # an existing file is not overwritten
    assert "--resume" in capsys.readouterr().err
    kept = found["text", True]["id"]
    target.write_text("\n".join(json.dumps(found[k]) for k in (("text", True), ("nobody", False))) + '\n{"id": "torn')
    assert run(*command, "--resume") == 0
    again = rows(target)
    assert len(again) == len(LINES) and [r["id"] for r in again if r["custom_id"] == "text" and r["error"] is None] == [kept]


def test_what_a_resume_keeps(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    states = {"ok": 200, "bad": 400, "broken": 500}
    path.write_text("".join(json.dumps({"custom_id": c, "response": {"status_code": s}}) + "\n" for c, s in states.items()) + '{"custom')
    assert finished_ids(path) == {"ok", "bad"}
    assert [r["custom_id"] for r in rows(path)] == ["ok", "bad"]
    assert finished_ids(tmp_path / "none.jsonl") == set()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "GET"}, "method"),
        ({"url": "/v1/models"}, "url"),
        ({"body": 3}, "body"),
        ({"custom_id": 3}, "custom_id"),
        ({"body": {"stream": True}}, "stream"),
    ],
)
def test_a_bad_line_is_named(change: dict[str, Any], word: str) -> None:
    line = ask("a", "/v1/completions", prompt="x")
    assert fault(line, set()) is None
    assert word in str(fault({**line, **change}, set()))
    assert "twice" in str(fault(line, {"a"}))


def test_latency_and_throughput_print_and_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "l.json"
    sizes = ["--input-len", "4", "--output-len", "3", "--output-json", str(out), *FAST]
    assert run("bench", "latency", "--batch-size", "2", "--num-iters", "2", "--num-iters-warmup", "0", *sizes) == 0
    assert "Median TPOT (ms):" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["completed"] == 4 and saved["total_output_tokens"] == 12 and len(saved["latencies"]) == 2
    assert run("bench", "throughput", "--num-prompts", "5", "--decode-only", "--no-warmup", *sizes) == 0
    printed = capsys.readouterr().out
    assert "output tokens/s" in printed and "Decode alone:" in printed and "do not run at once" in printed
    assert json.loads(out.read_text())["total_num_tokens"] == 35


def test_unknown_data_set_and_goal_are_one_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "throughput", "--dataset-name", "books") == 1
    assert run("bench", "serve", "--goodput", "speed:9", "--num-prompts", "1") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("presage: ") and line.endswith("[invalid_config]") for line in lines)


def test_collect_env_names_versions_and_hides_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("collect-env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["numpy"][0].isdigit() and found["kernels"].startswith("ISA(") and found["threads of a step"] >= 1
    monkeypatch.setenv("PRESAGE_API_KEY", "secret")
    monkeypatch.setenv("PRESAGE_PORT", "1")
    assert variables()["PRESAGE_API_KEY"] == "(hidden)" and variables()["PRESAGE_PORT"] == "1"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that ``presage serve`` would have served."""
    found: list[Any] = []
    monkeypatch.setattr(cli.app, "config", cli.app.config)
    monkeypatch.setattr("presage.serve.main.serve_forever", lambda config, http: found.append((config, http)) or 0)
    return found


def test_a_flag_beats_the_environment_beats_the_file(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "presage.yaml"
    path.write_text("max-num-seqs: 5\nmax_waiting: 50\nport: 7\n")
    monkeypatch.setenv("PRESAGE_MAX_WAITING", "60")
    assert run("serve", "m", "--config", str(path)) == 0
    assert run("serve", "m", "--config", str(path), "--max-waiting", "70", "--max-running-requests", "9") == 0
    (first, http), (second, _) = started
    assert (first.scheduler.max_num_seqs, first.scheduler.max_waiting, http.port, first.model.model) == (5, 60, 7, "m")
    assert (second.scheduler.max_num_seqs, second.scheduler.max_waiting) == (9, 70)


def test_an_unknown_key_of_the_file_is_an_error(started: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "presage.yaml"
    path.write_text("nonsense: 5\n")
    assert run("serve", "m", "--config", str(path)) != 0
    assert not started
