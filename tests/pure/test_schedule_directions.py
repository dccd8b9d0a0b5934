"""What each policy is for, shown in the simulator: the paper's direction against a baseline, and that doing without it loses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from presage.bench.workloads import Requests, Workload
from presage.core.config import EngineConfig
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.null import null_geometry
from presage.schedule import make_scheduler
from presage.simulate.latency.hardware import hardware
from presage.simulate.latency.roofline import Roofline
from presage.simulate.oracle import synthetic_base, synthetic_ids
from presage.simulate.run import Result, Target, simulate
from presage.simulate.shape import ModelShape

DENSE = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
EXPERTS = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_hidden_layers": 48, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip


def target(blocks: int = 4000, model: dict[str, Any] = DENSE, eos: tuple[int, ...] = ()) -> Target:
    latency = Roofline(ModelShape.of(model), hardware("a100-80"))
    return Target(latency, null_geometry(blocks), model["num_hidden_layers"], 8192, eos=eos)


def run(policy: str, work: Any, t: Target, dials: dict[str, Any] | None = None, *, model: bool = True, told: bool = False, **kw: Any) -> Result:
    """``model``: policies may ask the latency model; ``told``: they hear of arrivals."""
    config = EngineConfig.of(**{"max_num_seqs": 16, "scheduling_policy": policy, "scheduling_config": dials or {}} | kw)
    made = make_scheduler(config.scheduler)
    parts: dict[str, Any] = {"latency": lambda: t.latency} if model else {}
    if told:
        parts["companions"] = lambda: (made,)
    return simulate(config, work, t, scheduler=lambda: made, keep_tokens=True, **parts)


def request(name: str, at: float, n_in: int, n_out: int, **kw: Any) -> Request:
    ids = kw.pop("ids", None)
    ids = synthetic_ids(synthetic_base(name), 0, n_in) if ids is None else ids
    return Request(id=name, prompt=ids, sampling=SamplingParams(max_tokens=n_out, ignore_eos=True), arrival=at, **kw)


def gaps(r: Result) -> np.ndarray:
    return np.concatenate([np.diff(t) for t in r.tokens.values()])


def by_id(r: Result, values: np.ndarray) -> dict[str, float]:
    return dict(zip(r.ids, values.tolist()))


def prompts_among_decodes(n: int = 24) -> Requests:
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(np.log(1700), 0.6, n), 100, 6000).astype(np.int64)
    return Requests(Workload("r", np.cumsum(rng.exponential(1 / 3, n)), sizes, rng.integers(40, 150, n)))


WHOLE: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}


def test_sarathi_keeps_its_time_between_tokens() -> None:
    work, t = prompts_among_decodes(), target()
    whole = run("fcfs", work, t, **WHOLE)
    for model in (True, False):
        r = run("sarathi", work, t, {"tbt": 0.05}, model=model, max_num_batched_tokens=8192)
        assert np.percentile(gaps(r), 99) <= 0.05 < 0.4 * np.percentile(gaps(whole), 99)
        assert np.median(r.ttft) <= 1.5 * np.median(whole.ttft)
    # A looser objective buys larger passes: fewer steps, up to the objective.
    loose = run("sarathi", work, t, {"tbt": 0.1}, max_num_batched_tokens=8192)
    assert loose.n_steps < r.n_steps and 0.05 < gaps(loose).max() <= 0.1


def test_splitfuse_passes_are_equal() -> None:
    work, t = prompts_among_decodes(), target()
    r = run("splitfuse", work, t, {"target": 512}, max_num_batched_tokens=8192)
    whole = run("fcfs", work, t, **WHOLE)
    assert np.percentile(gaps(whole), 99) >= 2 * np.percentile(gaps(r), 99)
    prompt = r.steps["prompt_rows"] > 0
    full = r.steps["rows"][prompt] == 512
    # All but the last pass of each burst of prompts is exactly the target.
    assert full.mean() > 0.6 and r.steps["rows"].max() == 512
    wild = whole.steps["rows"][whole.steps["prompt_rows"] > 0]
    assert np.std(r.steps["rows"][prompt]) / np.mean(r.steps["rows"][prompt]) < 0.6 * np.std(wild) / np.mean(wild)


def test_layered_prefill_loads_experts_once() -> None:
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(np.log(5000), 0.4, 10), 1000, 7900).astype(np.int64)
    work = Requests(Workload("r", np.cumsum(rng.exponential(1.0, 10)), sizes, rng.integers(20, 60, 10)))
    found = {}
    for name, model in (("experts", EXPERTS), ("dense", DENSE)):
        chunked, layered = (run(p, work, target(model=model), max_num_batched_tokens=512) for p in ("fcfs", "layered"))
        found[name] = layered.busy / chunked.busy
        if name == "experts":
            assert layered.joules < chunked.joules and layered.ttft.mean() < 0.8 * chunked.ttft.mean()
            assert np.percentile(gaps(layered), 99) < 1.2 * np.percentile(gaps(chunked), 99)
    assert found["experts"] < 0.85 and found["dense"] > 0.97


def burst(n: int = 90) -> Requests:
    rng = np.random.default_rng(1)
    return Requests(Workload("r", np.linspace(0, 0.2, n), rng.integers(20, 100, n), np.clip(rng.lognormal(4, 1, n), 1, 800).astype(np.int64)))


def per_token(r: Result) -> float:
    return float((r.e2e / r.requests["n_out"]).mean())


def test_shortest_lowers_mean_latency() -> None:
    t = target()
    fcfs, shortest, remaining = (run(p, burst(), t, d) for p, d in (("fcfs", {}), ("shortest", {}), ("shortest", {"margin": 30.0})))
    assert shortest.e2e.mean() < 0.8 * fcfs.e2e.mean() and per_token(shortest) < 0.5 * per_token(fcfs)
    assert remaining.requests["preemptions"].sum() > 0 and per_token(remaining) < per_token(shortest)
    # Ageing strong enough is arrival order.
    aged = run("shortest", burst(), t, {"ageing": 1e7})
    assert aged.e2e.mean() == pytest.approx(fcfs.e2e.mean(), rel=0.02)


def test_a_better_ranker_gains_more() -> None:
    t = target()
    found = [per_token(run("ltr", burst(), t, {"noise": noise})) for noise in (0.0, 0.7, 2.0, 30.0)]
    fcfs = per_token(run("fcfs", burst(), t))
    assert found == sorted(found) and found[1] < 0.5 * fcfs and found[3] > 0.6 * fcfs
    # The scorer is not free: at a tenth of a second a request, half of the burst is unscored for as long as it matters.
    assert per_token(run("ltr", burst(), t, {"noise": 0.0, "cost": 0.1})) > 1.1 * found[0]


def test_fair_gives_tenants_equal_service() -> None:
    flood = [request(f"a{i}", 0.02 * i, 200, 40, tenant="flood") for i in range(80)]
    calm = [request(f"b{i}", 0.1 * i, 200, 40, tenant="calm") for i in range(16)]
    work = sorted(flood + calm, key=lambda r: r.arrival)
    waits, took = {}, {}
    for policy in ("fcfs", "fair"):
        r = run(policy, work, target(), max_num_seqs=4)
        took[policy] = r.duration
        e2e, done = by_id(r, r.e2e), by_id(r, r.requests["done"])
        waits[policy] = {k: np.mean([v for name, v in e2e.items() if name[0] == k]) for k in "ab"}
        if policy == "fair":
            # While both have work: equal numbers of equal requests.
            until = max(v for name, v in done.items() if name[0] == "b")
            count = sum(v <= until for name, v in done.items() if name[0] == "a")
            assert abs(count - 16) <= 5
    assert waits["fair"]["b"] < 0.6 * waits["fcfs"]["b"] and took["fair"] == pytest.approx(took["fcfs"], rel=0.02)


def test_deadline_raises_attainment() -> None:
    rng = np.random.default_rng(0)
    at = np.cumsum(rng.exponential(1 / 16, 80))
    calls = [(f"d{i}", at[i], int(rng.integers(50, 800)), int(rng.integers(10, 120)), float(rng.choice([1.5, 6.0]))) for i in range(80)]
    attained = {}
    for policy, soft in (("fcfs", False), ("deadline", False), ("fcfs", True), ("deadline", True)):
        due = {name: a + slack + 0.03 * n for name, a, _, n, slack in calls}
        work = [request(n, a, p, o, **({"extras": {"due": due[n]}} if soft else {"due_end": due[n]})) for n, a, p, o, _ in calls]
        r = run(policy, work, target(), max_num_seqs=8, told=policy == "deadline")
        done = by_id(r, np.where(r.ok, r.requests["done"], np.inf))
        attained[policy, soft] = np.mean([done[n] <= due[n] for n in due])
    for soft in (False, True):
        assert attained["deadline", soft] > attained["fcfs", soft] + 0.05


def test_who_is_lost_does_not_drag_the_others_along() -> None:
    """Overload: twice as much as can be served, so some are lost whatever is done."""
    rng = np.random.default_rng(0)
    calls = [(f"d{i}", 0.02 * i, int(rng.integers(20, 100)), float(rng.uniform(1, 4))) for i in range(60)]
    attained = []
    for relegate in (False, True):
        due = {name: a + slack for name, a, _, slack in calls}
        work = [request(n, a, 50, o, extras={"due": due[n]}) for n, a, o, _ in calls]
        r = run("deadline", work, target(), {"relegate": relegate}, max_num_seqs=4, told=True)
        done = by_id(r, r.requests["done"])
        attained.append(np.mean([done[n] <= due[n] for n in due]))
    assert attained[1] > 1.5 * attained[0]


def test_cache_aware_raises_the_hit_rate() -> None:
    rng = np.random.default_rng(0)
    at, group = np.cumsum(rng.exponential(1 / 40, 80)), rng.integers(0, 8, 80)
    work = []
    for i in range(80):
        head, tail = synthetic_ids(1_000_000 * int(group[i] + 1), 0, 1024), synthetic_ids(50_000_000 + 1000 * i, 0, int(rng.integers(20, 100)))
        work.append(request(f"c{i}", float(at[i]), 0, int(rng.integers(10, 40)), ids=np.concatenate([head, tail])))
    hits = {}
    for policy in ("fcfs", "cache_aware"):
        r = run(policy, work, target(150), told=policy == "cache_aware", max_num_batched_tokens=2048)
        hits[policy] = r.requests["n_cached"].sum() / r.requests["n_in"].sum()
        assert r.ok.all()
    assert hits["cache_aware"] > 1.3 * hits["fcfs"]


def test_the_forecast_avoids_preemptions() -> None:
    rng = np.random.default_rng(0)
    said = np.clip(rng.lognormal(5.0, 0.8, 60), 10, 1500).astype(np.int64)
    work = [
        Request(
            id=f"t{i}", prompt=synthetic_ids(77777 * i, 0, int(rng.integers(20, 100))), sampling=SamplingParams(max_tokens=2000),
            arrival=0.05 * i, extras={"reply": np.r_[np.full(said[i], 9), 2].astype(np.int32)},
        )
        for i in range(60)
    ]  # fmt: skip
    found = [run(p, work, target(100, eos=(2,)), max_num_seqs=64) for p in ("fcfs", "budget")]
    few = [r.requests["preemptions"].sum() for r in found]
    assert few[1] <= 0.3 * few[0] and found[1].duration <= 1.05 * found[0].duration


POLICIES = ["sarathi", "splitfuse", "layered", "splits", "ltr", "shortest", "fair", "deadline", "cache_aware", "budget"]


@pytest.mark.parametrize("policy", POLICIES)
def test_bursts_change_nothing(policy: str) -> None:
    """The simulator skips steps that a policy calls steady; results must not show it."""
    rng = np.random.default_rng(0)
    work = Requests(Workload("r", np.cumsum(rng.exponential(0.1, 12)), rng.integers(20, 500, 12), rng.integers(10, 80, 12)))
    t = dataclasses.replace(target(60), max_model_len=1024)
    config = EngineConfig.of(scheduling_policy=policy, max_num_seqs=6, max_num_batched_tokens=128)
    runs = [simulate(config, work, t, bursts=b, latency=lambda: t.latency) for b in (True, False)]
    assert runs[0].ids == runs[1].ids
    for key in runs[0].requests:
        np.testing.assert_array_equal(runs[0].requests[key], runs[1].requests[key], err_msg=key)
    assert runs[0].turns < runs[1].turns or policy == "fair"
