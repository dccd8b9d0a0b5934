"""Latency models: the roofline against counting by hand, collectives, monotony, fits that find known weights, tables against their own rows."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from presage.bench.workloads import read_vllm_records
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError, NotEnoughMemory
from presage.simulate.latency import table
from presage.simulate.latency.fitted import TERMS, Fitted, fit, nnls, steps_of_log, terms
from presage.simulate.latency.hardware import HARDWARE, Hardware, hardware
from presage.simulate.latency.roofline import Roofline, calibrated
from presage.simulate.latency.transfer import Transferred
from presage.simulate.measured import compare
from presage.simulate.run import Target
from presage.simulate.shape import ModelShape
from tests.pure.test_replay import record
from tests.pure.test_simulate_loop import LLAMA
from tests.shared import shared_data

LLAMA_8B = ModelShape.of(LLAMA)
PLAIN = Hardware("plain", 1000, 1000, 80, 1000, 100, compute_eff=1, memory_eff=1, link_eff=1, launch=0, overhead=0)
SPARSE = {
    "model_type": "mixtral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def step(*spans: tuple[int, int, int], layers: float = 1.0) -> np.ndarray:
    """Features of spans (start, count, nodes); a span whose count is 1 decodes, the others are last chunks of prompts."""
    f = np.zeros(12)
    for start, count, nodes in spans:
        rows = count + nodes
        f += [rows, 1, count == 1, 0 if count == 1 else count, nodes, 1 + nodes, start + rows, rows * (start + rows), 0, 0, 0, 0]
    f[8] = layers
    return f[None]


def ops(r: Roofline, f: np.ndarray) -> dict[str, dict[str, Any]]:
    return {str(row["op"]): row for row in r.explain(f[0])}


def test_sizes_of_known_models() -> None:
    assert LLAMA_8B.numbers == pytest.approx(8.03e9, rel=2e-3) and LLAMA_8B.kv_token_bytes() == 128 * 1024
    known = {
        "meta-llama--Meta-Llama-3.1-70B": (70.6e9, 320), "meta-llama--Meta-Llama-3.1-405B": (405.9e9, 504),
        "Qwen--Qwen3-30B-A3B": (30.5e9, 96), "Qwen--Qwen3-235B-A22B": (235.1e9, 188), "mistralai--Mixtral-8x7B-v0.1": (46.7e9, 128),
        "deepseek-ai--DeepSeek-V3": (671e9, 68.6), "Qwen--Qwen3-0.6B": (0.596e9, 112),
    }  # fmt: skip
    for name, (numbers, kib) in known.items():
        m = ModelShape.of(shared_data(f"model_configs/{name}_config.json"))
        assert m.numbers == pytest.approx(numbers, rel=0.01), name
        assert m.kv_token_bytes() / 1024 == pytest.approx(kib, rel=0.01), name


def test_decode_by_hand() -> None:
    """One request at context 1000: every weight is read once, every key and value of 1001 tokens too."""
    r = Roofline(LLAMA_8B, PLAIN)
    found = ops(r, step((1000, 1, 0)))
    gemms = sum(row["flops"] for name, row in found.items() if name not in ("attend", "norms", "embed"))
    embedding = 128256 * 4096
    assert gemms == 2 * (LLAMA_8B.numbers - embedding)
    assert found["attend"]["flops"] == 32 * 4 * 32 * 128 * 1001
    assert found["attend"]["bytes"] == 32 * (1001 * 2 * 8 * 128 * 2 + 2 * 4096 * 2 + 2 * 8 * 128 * 2)
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) * 2 + embedding * 2
    total = sum(row["bytes"] for row in found.values())
    assert weights + found["attend"]["bytes"] < total < 1.001 * weights + found["attend"]["bytes"]
    assert all(row["bound"] == "memory" for row in found.values())
    assert r.predict(step((1000, 1, 0)))[0, 0] == pytest.approx(total / 1e12, abs=1e-6)


def test_prefill_by_hand() -> None:
    """4096 tokens: two operations per weight and token, causal attention, one row of logits; compute bound."""
    r = Roofline(LLAMA_8B, PLAIN)
    found = ops(r, step((0, 4096, 0)))
    inner = LLAMA_8B.numbers - 2 * 128256 * 4096
    assert sum(found[k]["flops"] for k in ("attn_in", "attn_out", "mlp_up", "mlp_down")) == 2 * inner * 4096
    assert found["attend"]["flops"] == 32 * 4 * 32 * 128 * 4096 * 4097 / 2
    assert found["lm_head"]["flops"] == 2 * 128256 * 4096
    assert {k for k, row in found.items() if row["bound"] == "compute"} == {"attn_in", "attn_out", "mlp_up", "mlp_down", "attend"}


def test_a_chunk_sees_what_came_before() -> None:
    r = Roofline(LLAMA_8B, PLAIN)
    halves = [ops(r, step((start, 2048, 0)))["attend"]["flops"] for start in (0, 2048)]
    assert sum(halves) == ops(r, step((0, 4096, 0)))["attend"]["flops"]


def test_verifying_a_draft_costs_rows_not_requests() -> None:
    r = Roofline(LLAMA_8B, PLAIN)
    plain, verify, batch = (ops(r, step(*s)) for s in ([(1000, 1, 0)], [(1000, 1, 7)], [(1000, 1, 0)] * 8))
    assert verify["mlp_up"]["flops"] == batch["mlp_up"]["flops"] == 8 * plain["mlp_up"]["flops"]
    assert verify["attend"]["bytes"] < 1.2 * plain["attend"]["bytes"] < 0.2 * batch["attend"]["bytes"]
    assert verify["lm_head"]["flops"] == 8 * plain["lm_head"]["flops"]


def test_experts_are_read_as_they_are_touched() -> None:
    m = ModelShape.of(SPARSE)
    r = Roofline(m, PLAIN)
    one, many = (ops(r, step(*[(100, 1, 0)] * n))["experts"] for n in (1, 512))
    each = 32 * 3 * 4096 * 14336
    assert one["flops"] == 2 * each * 2 and many["flops"] == 512 * one["flops"]
    assert one["bytes"] == pytest.approx(2 * each * 2, rel=0.01) and many["bytes"] == pytest.approx(8 * each * 2, rel=0.2)


def test_collectives() -> None:
    """Ring all-reduce: start + 2 (N - 1) hops + 2 (N - 1) / N of the bytes over the link; none on one device."""
    assert "all_reduce" not in ops(Roofline(LLAMA_8B, PLAIN), step((0, 512, 0)))
    found = ops(Roofline(LLAMA_8B, PLAIN, tp=4), step((0, 512, 0)))["all_reduce"]
    assert found["seconds"] == pytest.approx(64 * (5e-6 + 6 * 1e-6 + 1.5 * 512 * 4096 * 2 / 1e11)) and found["bound"] == "link"
    with pytest.raises(ConfigError, match="no link"):
        Roofline(LLAMA_8B, replace(PLAIN, link=0), tp=2)
    split, whole = (Roofline(LLAMA_8B, PLAIN, tp=n).predict(step((0, 4096, 0)))[0, 0] for n in (4, 1))
    assert whole / 4 < split < whole


def test_sliding_windows_bound_what_is_read() -> None:
    m = ModelShape.of(LLAMA | {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 16})
    found = ops(Roofline(m, PLAIN), step((4000, 1, 0)))
    assert found["attend_window"]["flops"] == pytest.approx(found["attend"]["flops"] * 512 / 4001)
    assert [g.window for g in m.geometry(80e9).groups] == [0, 512]


def test_part_of_the_layers_costs_part_of_the_time() -> None:
    """Layered prefill: decoding rows pass all layers, the prompt a quarter; four such steps are one prefill and three further decodes."""
    r = Roofline(LLAMA_8B, replace(PLAIN, compute_eff=0.5))
    decode, prompt = [(500, 1, 0)] * 32, (0, 1024, 0)
    mixed, alone = r.predict(step(*decode, prompt))[0, 0], r.predict(step(*decode))[0, 0]
    quarter = step(*decode, prompt, layers=(32 + 256) / (32 + 1024))
    four = 4 * r.predict(quarter)[0, 0]
    assert four == pytest.approx(mixed + 3 * alone, rel=0.02)


@given(
    rows=st.integers(1, 4000), start=st.integers(0, 4000), decodes=st.integers(0, 64), more=st.integers(1, 500),
    device=st.sampled_from(sorted(HARDWARE)), sparse=st.booleans(),
)  # fmt: skip
def test_more_work_never_takes_less(rows: int, start: int, decodes: int, more: int, device: str, sparse: bool) -> None:
    models = [Roofline(ModelShape.of(SPARSE) if sparse else LLAMA_8B, hardware(device)), Fitted(np.full(len(TERMS), 1e-6))]
    base = [(700, 1, 0)] * decodes
    chunk = (start, rows, 0)
    others = [(*base, (start, rows + more, 0)), (*base, (start + more, rows, 0)), (*base, (700, 1, 0), chunk)]
    steps = np.concatenate([step(*base, chunk), *(step(*spans) for spans in others)])
    for model in models:
        answer = model.predict(steps)
        assert (answer[1:, 0] >= answer[0, 0]).all() and (answer[1:, 1] >= answer[0, 1] - 1e-9).all() and (answer[:, 0] > 0).all()
        np.testing.assert_array_equal(answer, np.concatenate([model.predict(steps[i : i + 1]) for i in range(4)]))


def test_energy_is_between_idle_and_full_power() -> None:
    r = Roofline(LLAMA_8B, replace(PLAIN, static=0.3))
    for f in (step((0, 4096, 0)), step((1000, 1, 0))):
        seconds, joules = r.predict(f)[0]
        assert 300 * seconds < joules < 1000 * seconds
    assert r.idle_watts == 300


def test_what_does_not_fit_is_refused() -> None:
    big = ModelShape.of(shared_data("model_configs/meta-llama--Meta-Llama-3.1-70B_config.json"))
    with pytest.raises(NotEnoughMemory, match="weights"):
        big.geometry(hardware("h100").memory)
    blocks = big.geometry(hardware("h100").memory, tp=4, block_size=32).num_blocks[0]
    assert blocks == pytest.approx((0.9 * 80 * 2**30 - 141e9 / 4) / (320 * 1024 / 4 * 32), rel=0.02)
    with pytest.raises(ConfigError, match="hidden_size"):
        ModelShape.of({"num_attention_heads": 2})
    with pytest.raises(ConfigError, match="known"):
        hardware("abacus")


# ---- fitted


def random_steps(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        spans = [(int(rng.integers(1, 3000)), 1, 0)] * int(rng.integers(0, 40))
        if rng.random() < 0.5 or not spans:
            spans.append((int(rng.integers(0, 2000)), int(rng.integers(2, 1500)), 0))
        out.append(step(*spans)[0])
    return np.array(out)


def test_least_squares_with_bounds() -> None:
    rng = np.random.default_rng(1)
    a, x = rng.random((60, 6)), np.array([0.0, 2.0, 0.0, 1.0, 0.0, 3.0])
    np.testing.assert_allclose(nnls(a, a @ x), x, atol=1e-9)
    found = nnls(a, a @ np.array([1.0, -2.0, 1.0, 0.5, 0.0, 1.0]))
    residual = a.T @ (a @ found - a @ np.array([1.0, -2.0, 1.0, 0.5, 0.0, 1.0]))
    # The conditions of Karush, Kuhn and Tucker: no free weight can improve, no bound one wants to grow.
    assert (found >= 0).all() and (residual[found == 0] >= -1e-9).all() and np.abs(residual[found > 0]).max() < 1e-9


def test_a_fit_finds_the_roofline_it_saw(tmp_path: Path) -> None:
    truth = Roofline(LLAMA_8B, hardware("a100-80"))
    seen, new = random_steps(400), random_steps(200, 1)
    noise = np.random.default_rng(2).lognormal(0, 0.03, 400)
    seconds = truth.predict(seen)[:, 0] * noise
    seconds[::50] *= 20  # pauses of the machine
    model = fit(seen, seconds, power=(90.0, 400.0), about={"machine": "test"})
    errors = model.errors(new, truth.predict(new)[:, 0])
    assert errors["median"] < 0.05 and errors["p95"] < 0.15 and abs(errors["bias"]) < 0.05
    assert model.about["left_out"] == 8 and (model.weights >= 0).all()
    model.save(tmp_path / "m.json")
    again = Fitted.load(tmp_path / "m.json")
    np.testing.assert_array_equal(again.predict(new), model.predict(new))
    assert again.version == model.version and "test" in again.version
    (tmp_path / "m.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ConfigError, match="fitted"):
        Fitted.load(tmp_path / "m.json")
    with pytest.raises(ConfigError, match="16"):
        fit(seen[:3], seconds[:3])


def test_a_straight_line_in_rows_is_too_stiff() -> None:
    truth, seen = Roofline(LLAMA_8B, hardware("a100-80")), random_steps(400)
    seconds = truth.predict(seen)[:, 0]
    stiff = Fitted(nnls(terms(seen)[:, :8] / seconds[:, None], np.ones(400)).tolist() + [0.0] * 5)  # type: ignore[arg-type, operator]
    stiff.weights = np.array(stiff.weights)
    assert stiff.errors(seen, seconds)["median"] > 1.5 * fit(seen, seconds).errors(seen, seconds)["median"]


def test_a_decision_log_is_a_profile(tmp_path: Path) -> None:
    b = record(tmp_path, "shape")
    features, seconds = steps_of_log(tmp_path)
    assert len(features) == len(seconds) == b.loop.steps
    assert features[:, 0].sum() == b.loop.stats["computed"] and (features[:, 8] == 1).all()


def test_calibration_recovers_efficiencies() -> None:
    truth = Roofline(LLAMA_8B, replace(hardware("h100"), compute_eff=0.5, memory_eff=0.75, launch=0.0, overhead=2e-3))
    seen = random_steps(60)
    found = calibrated(LLAMA_8B, hardware("h100"), seen, truth.predict(seen)[:, 0], on="a test")
    assert abs(found.hardware.compute_eff - 0.5) < 0.06 and abs(found.hardware.memory_eff - 0.75) < 0.06
    assert abs(found.hardware.overhead - 2e-3) < 3e-4 and "a test" in found.version


# ---- tables


def test_curves() -> None:
    c = table.Curve.of([(1, 1.0), (4, 4.0), (2, 1.0), (2, 3.0)])
    np.testing.assert_allclose(c(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 6.0])), [1, 1, 2, 3, 4, 6])
    np.testing.assert_allclose((c + c)(np.array([3.0, 8.0])), [6, 16])


def test_the_attention_grid_answers_its_own_points() -> None:
    folder = shared_data("perf_llmservingsim/RTXPRO6000_Llama-3.1-8B_tp1")
    model = table.llmservingsim(folder, 32)
    text = (folder / "attention.csv").read_text().splitlines()
    rows = [r for r in csv.DictReader(text) if all(int(v) & (int(v) - 1) == 0 for k, v in r.items() if k != "time_us")]
    rng, tried = np.random.default_rng(0), 0
    for r in (rows[i] for i in rng.integers(0, len(rows), 300)):
        c, p, n, k = (int(r[key]) for key in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"))
        # The engine's decoding row reads the key it writes, so a context of k is a start of k - 1.
        spans = [(k - 1, 1, 0)] * n + ([(p, c, 0)] if c else [])
        found = model.attention(step(*spans))[0]
        assert found == pytest.approx(float(r["time_us"]) * 1e-6, rel=1e-6), r
        tried += c > 0 and n > 0
    assert tried > 100


def test_vidur_tables() -> None:
    m = ModelShape.of(shared_data("model_configs/meta-llama--Meta-Llama-3.1-8B_config.json"))
    path = shared_data("perf_vidur/a100_Meta-Llama-3-8B_mlp.csv")
    reduce = shared_data("perf_vidur/a100_dgx_all_reduce.csv")
    a100 = hardware("a100-80")
    one = table.vidur(path, m, a100)
    prefill, decode = step((0, 4096, 0)), step((1000, 1, 0))
    # Two operations per weight and token at the A100's 312 TFLOP/s; all weights at its 2.04 TB/s.
    assert 4096 * 2 * 7e9 / 312e12 < one.predict(prefill)[0, 0] < 2 * 4096 * 2 * 7e9 / 312e12
    assert 15e9 / 2.039e12 < one.predict(decode)[0, 0] < 2 * 15e9 / 2.039e12
    two = table.vidur(path, m, a100, tp=2, all_reduce=reduce)
    assert one.predict(prefill)[0, 0] / 2 < two.predict(prefill)[0, 0] < one.predict(prefill)[0, 0]
    with pytest.raises(ConfigError, match="sizes"):
        table.vidur(path, ModelShape.of(LLAMA | {"hidden_size": 2048}), a100)
    with pytest.raises(ConfigError, match="3 workers"):
        table.vidur(path, m, a100, tp=3)
    with pytest.raises(ConfigError, match="all_reduce"):
        table.vidur(path, m, a100, tp=2)


def test_a_measured_vllm_run_is_predicted_from_operator_tables_alone() -> None:
    """RTX PRO 6000, Llama-3.1-8B, 300 requests of ShareGPT: nothing here was fitted to the run."""
    run = read_vllm_records(shared_data("vllm_measured_runs/RTXPRO6000_Llama-3.1-8B/requests.jsonl"))
    m = ModelShape.of(shared_data("model_configs/meta-llama--Meta-Llama-3.1-8B_config.json"))
    tables = table.llmservingsim(shared_data("perf_llmservingsim/RTXPRO6000_Llama-3.1-8B_tp1"), m.layers)
    config = EngineConfig.of(max_num_batched_tokens=2048, max_num_seqs=128, enable_prefix_caching=False)
    device = hardware("rtxpro6000")
    geometry = m.geometry(device.memory, max_num_batched_tokens=2048, max_model_len=16384)
    errors = compare(run, config, Target(tables, geometry, m.layers, 16384))
    assert abs(errors["tpot"]["mean"]) < 0.05 and abs(errors["e2e"]["mean"]) < 0.08 and abs(errors["ttft"]["mean"]) < 0.12
    moved = Transferred(tables, Roofline(m, device), Roofline(m, hardware("b200")))
    assert moved.predict(step((0, 2048, 0)))[0, 0] < 0.5 * tables.predict(step((0, 2048, 0)))[0, 0]
