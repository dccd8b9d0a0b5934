"""``presage simulate`` from words to files; speculation in a simulation; steps of a log for a fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from presage.bench.rows import read_rows
from presage.bench.workloads import Requests, Workload, closed_loop, read_vllm_workload
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.serve.cli import app
from presage.serve.cli_simulate import Load, Machine, _workload
from presage.simulate.latency.fitted import fit
from presage.simulate.oracle import LawOracle
from presage.simulate.run import simulate
from presage.simulate.speculation import Drafting, drafting
from presage.simulate.targets import make_target, prices, shape_of
from tests.pure.test_simulate_latency import random_steps
from tests.pure.test_simulate_loop import LLAMA, target, trace
from tests.shared import shared_data


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, without weights."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def test_from_the_command_line_to_files(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, rows, figures = tmp_path / "r.html", tmp_path / "r.csv", tmp_path / "r.json"
    words = ["simulate", str(model), "--workload", "azure", "--dataset-path", str(shared_data("azure_llm_2023")), "--num-prompts", "60"]
    words += ["--hardware", "a100-80", "--tensor-parallel-size", "2", "--replicas", "2", "--goodput", "ttft:500", "--scheduling-policy", "priority"]
    with pytest.raises(SystemExit) as end:
        app([*words, "--html", str(page), "--save-records", str(rows), "--json", str(figures)])
    assert not end.value.code
    said, found = capsys.readouterr().out, json.loads(figures.read_text())
    assert "Simulated Serving Result" in said and "roofline llama on 2 x a100-80" in said
    assert found["completed"] == 60 == len(read_rows(rows)) and found["joules"] > 0
    text = page.read_text()
    assert "<svg" in text and "watts" in text and "roofline llama" in text


def test_without_any_data(tmp_path: Path) -> None:
    """The bundled model's shape and drawn lengths: nothing of one's own is needed."""
    figures = tmp_path / "r.json"
    words = ["simulate", "presage-tiny", "--num-prompts", "50", "--random-input-len", "64", "--random-output-len", "20"]
    with pytest.raises(SystemExit) as end:
        app([*words, "--random-range-ratio", "0.5", "--request-rate", "100", "--json", str(figures)])
    assert not end.value.code
    found = json.loads(figures.read_text())
    assert found["completed"] == 50 and 32 * 50 < found["total_input_tokens"] < 96 * 50
    with pytest.raises(ConfigError, match="random_range_ratio"):
        _workload(Load(random_range_ratio=1.0))
    with pytest.raises(ConfigError, match="num_prompts"):
        _workload(Load(num_prompts=0))


def test_words_that_mean_nothing_are_answered(model: Path, tmp_path: Path) -> None:
    shape, config = shape_of(model), EngineConfig()
    with pytest.raises(ConfigError, match=r"config\.json"):
        shape_of(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="known"):
        make_target(config, shape, "abacus")
    with pytest.raises(ConfigError, match="roofline"):
        make_target(config, shape, "h100", latency="guess")
    with pytest.raises(ConfigError, match="acceptance"):
        drafting(EngineConfig.of(speculative_config='{"method": "ngram"}'), 1000, 1.5)


def test_a_fit_prices_a_simulation(model: Path, tmp_path: Path) -> None:
    target_ = make_target(EngineConfig(), shape_of(model), "h100")
    seen = random_steps(100)
    fit(seen, target_.latency.predict(seen)[:, 0]).save(tmp_path / "fit.json")
    fitted = prices(str(tmp_path / "fit.json"), shape_of(model), None)  # type: ignore[arg-type]
    off = fitted.predict(seen)[:, 0] / target_.latency.predict(seen)[:, 0] - 1
    assert np.median(np.abs(off)) < 0.05


def test_arrivals_as_asked_for() -> None:
    where = {"workload": "azure", "dataset_path": str(shared_data("azure_llm_2023")), "num_prompts": 100}
    assert _workload(Load(**where, request_rate=3.0)).rate == pytest.approx(3.0)  # type: ignore[arg-type]
    assert _workload(Load(**where, replay_speed=5.0)).rate == pytest.approx(5 * _workload(Load(**where)).rate)  # type: ignore[arg-type]
    users = _workload(Load(**where, max_concurrency=4))  # type: ignore[arg-type]
    assert (users.after < 0).sum() == 4 and Machine().replicas == 1


def test_a_closed_loop_holds_its_users() -> None:
    work = closed_loop(Workload("w", np.zeros(40), np.full(40, 100), np.full(40, 20)), 4)
    requests = Requests(work)
    r = simulate(EngineConfig(), requests, target(), after=requests.after)
    order = np.argsort(r.requests["arrival"])
    begin, end = r.requests["arrival"][order], r.requests["done"][order]
    assert len(r.ids) == 40
    # No more than four at a time, and never fewer while there is work.
    for at in begin[4:]:
        assert (begin <= at).sum() - (end <= at).sum() == 4


def test_assumed_drafts_come_true_at_their_rate() -> None:
    config = EngineConfig.of(speculative_config='{"method": "ngram", "num_speculative_tokens": 3, "length": "fixed"}', max_num_batched_tokens=512)
    plain = simulate(config, trace(40), target())
    price = target()
    price = type(price)(Drafting(price.latency, 1e-3), price.geometry, price.layers, price.max_model_len)
    drafted = simulate(
        config, trace(40), price, oracle=lambda: LawOracle(0.8, 1), speculation=lambda: drafting(config, 128256, 0.8), max_drafts=512
    )  # fmt: skip
    assert drafted.requests["n_out"].sum() == plain.requests["n_out"].sum()
    assert drafted.steps["draft_rows"].sum() > 0
    # 1 + 0.8 + 0.64 + 0.512 tokens a step where nothing ends: 2.95, less the cost of drafting.
    assert 1.5 < np.nanmedian(plain.tpot) / np.nanmedian(drafted.tpot) < 2.95


def test_real_drafters_guess_recorded_replies() -> None:
    work = read_vllm_workload(shared_data("vllm_measured_runs"))
    work = work.take(np.flatnonzero(work.n_in + work.n_out < 900)[:16])
    config = EngineConfig.of(speculative_config='{"method": "suffix"}', max_num_seqs=8)
    runs = [
        simulate(config, Requests(work, replies=True), target(1200), **extra)  # type: ignore[arg-type]
        for extra in ({}, {"speculation": lambda: drafting(config, 128256), "max_drafts": 256})
    ]
    assert runs[0].ok.all() and (runs[0].requests["n_out"].sum() == runs[1].requests["n_out"].sum())
    assert runs[1].n_steps < 0.9 * runs[0].n_steps
