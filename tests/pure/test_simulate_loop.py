"""The virtual driver: same inputs, same results; every token once and in order of time; bursts change nothing; logs replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presage.bench.workloads import Requests, Workload
from presage.cache.content import HashedContent
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.events import Abort, Arrive
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.log import DecisionLog, NamedContent
from presage.engine.null import null_geometry
from presage.engine.replay import log_header, replay
from presage.simulate.collect import Collector
from presage.simulate.driver import VirtualDriver
from presage.simulate.latency.hardware import hardware
from presage.simulate.latency.roofline import Roofline
from presage.simulate.oracle import LawOracle, synthetic_ids
from presage.simulate.run import Result, Target, make_replica, simulate
from presage.simulate.shape import ModelShape
from tests.pure.test_loop import AllIn

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip


def target(blocks: int = 400, windows: tuple[int, ...] = (0,), **kw: Any) -> Target:
    latency = Roofline(ModelShape.of(LLAMA), hardware("h100"))
    return Target(latency, null_geometry(blocks, windows=windows), 32, 2048, idle_watts=latency.idle_watts, **kw)


def trace(n: int = 50, rate: float = 20.0, seed: int = 0) -> Requests:
    rng = np.random.default_rng(seed)
    return Requests(Workload("r", np.cumsum(rng.exponential(1 / rate, n)), rng.integers(1, 600, n), rng.integers(1, 200, n)))


def config(**kw: Any) -> EngineConfig:
    return EngineConfig.of(**{"max_num_seqs": 16, "max_num_batched_tokens": 256} | kw)


def same(a: Result, b: Result) -> None:
    assert a.ids == b.ids
    for key in a.requests:
        np.testing.assert_array_equal(a.requests[key], b.requests[key], err_msg=key)
    assert (a.duration, a.n_steps) == (b.duration, b.n_steps)
    assert a.busy == pytest.approx(b.busy) and a.joules == pytest.approx(b.joules)


def test_same_inputs_same_results() -> None:
    same(simulate(config(), trace(), target()), simulate(config(), trace(), target()))


@pytest.mark.parametrize("policy", ["fcfs", "priority", "layered"])
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("blocks", "windows"), [(400, (0,)), (60, (0,)), (300, (0, 96))])
def test_bursts_change_nothing(policy: str, ahead: bool, blocks: int, windows: tuple[int, ...]) -> None:
    setting = config(scheduling_policy=policy, async_scheduling=ahead)
    runs = [simulate(setting, trace(), target(blocks, windows), bursts=b, keep_tokens=True) for b in (True, False)]
    same(*runs)
    assert runs[0].tokens.keys() == runs[1].tokens.keys()
    for key, times in runs[0].tokens.items():
        np.testing.assert_array_equal(times, runs[1].tokens[key])
    if policy != "layered":
        assert runs[0].turns < (0.7 if blocks == 400 else 1) * runs[1].turns


class Eager(VirtualDriver):
    """What the wall driver does: every arrival is a turn, the plan ahead is made at launch."""

    def _arrive(self, request: Request) -> None:
        self._deliver(0, [Arrive(request)])


def test_putting_plans_and_arrivals_off_changes_nothing() -> None:
    runs = []
    for kind in (VirtualDriver, Eager):
        out = Collector()
        replica = make_replica(config(), target(60), out)
        assert replica.lazy
        if kind is Eager:
            replica.lazy, replica.loop.config.ahead = False, True
        driver = kind([replica], trace(), bursts=False)
        driver.run()
        runs.append((out.rows.table(), driver.turns))
    (a, few), (b, many) = runs
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert few < many


def test_every_token_once_and_in_order() -> None:
    work = trace(120, 60.0)
    r = simulate(config(), work, target(80), keep_tokens=True)
    assert r.requests["preemptions"].sum() > 0
    at = {name: i for i, name in enumerate(r.ids)}
    assert len(at) == len(work) and r.ok.all()
    order = [at[f"r{i}"] for i in range(len(work))]
    np.testing.assert_array_equal(r.requests["n_out"][order], work.workload.n_out)
    np.testing.assert_array_equal(r.requests["n_in"][order], work.workload.n_in)
    for i in range(len(work)):
        times = r.tokens[int(r.requests["replica"][i]), int(r.requests["seq"][i])]
        row = {k: v[i] for k, v in r.requests.items()}
        assert len(times) == row["n_out"] and (np.diff(times) > 0).all()
        assert row["arrival"] <= row["start"] < row["first"] == times[0] and times[-1] == row["done"]
    steps = r.steps
    assert (steps["t0"][1:] >= steps["t1"][:-1] - 1e-12).all() and (steps["t1"] > steps["t0"]).all()
    assert r.n_steps == steps["repeat"].sum() and steps["joules"].sum() == pytest.approx(r.joules - target().idle_watts * (r.duration - r.busy))
    summary = r.summary({"ttft": 1e9})
    assert summary.completed == len(work) == summary.good and len(summary.samples["itl"]) == (work.workload.n_out - 1).sum()


def test_runs_end_early_on_demand_and_keep_what_they_have() -> None:
    whole = simulate(config(), trace(), target())
    part = simulate(config(), trace(), target(), until=whole.duration / 2)
    assert 0 < len(part.ids) < len(whole.ids) and part.ids == whole.ids[: len(part.ids)]

    def stopped() -> Any:
        yield from list(trace())[:60]
        raise KeyboardInterrupt

    cut = simulate(config(), stopped(), target())
    assert cut.interrupted and cut.ids == whole.ids[: len(cut.ids)] and not whole.interrupted


def test_replicas_share_the_load() -> None:
    one, four = (simulate(config(), trace(200, 200.0), target(), replicas=n) for n in (1, 4))
    assert set(four.requests["replica"]) == {0, 1, 2, 3} and sorted(one.ids) == sorted(four.ids)
    assert np.median(four.ttft) < np.median(one.ttft) and four.duration < one.duration


def test_a_closed_loop_follows_its_answers() -> None:
    def request(name: str, at: float) -> Request:
        return Request(id=name, prompt=synthetic_ids(5, 0, 90), sampling=SamplingParams(max_tokens=30, ignore_eos=True), arrival=at)

    done: list[float] = []

    def after(req: Request, now: float) -> list[Request]:
        user, _, turn = req.id.partition("-")
        return [request(f"{user}-{int(turn) + 1}", 0.0)] if int(turn) < 3 else []

    runs = [simulate(config(), [request(f"u{i}-0", 0.1 * i) for i in range(5)], target(), after=after, replicas=2, bursts=b) for b in (True, False)]
    same(*runs)
    r = runs[0]
    at = {name: i for i, name in enumerate(r.ids)}
    assert len(r.ids) == 20
    for name, i in at.items():
        user, _, turn = name.partition("-")
        if turn != "0":
            done.append(r.requests["start"][i] - r.requests["done"][at[f"{user}-{int(turn) - 1}"]])
    assert min(done) >= 0 and r.requests["n_cached"].sum() > 0


def test_prefix_hits_and_recorded_replies() -> None:
    said = [7, 8, 9, 2, 4]
    requests = [
        Request(id=f"q{i}", prompt=synthetic_ids(1, 0, 130), sampling=SamplingParams(max_tokens=50), arrival=float(i), extras={"reply": said})
        for i in range(2)
    ]
    r = simulate(config(), requests, target(eos=(2,)))
    assert r.requests["n_out"].tolist() == [4, 4] and r.requests["n_cached"].tolist() == [0, 128]


class Guess:
    """Chains of what the text will be, with every fourth guess wrong."""

    def open(self, slot: int, req: Request) -> None:
        self.base = getattr(self, "base", {}) | {slot: req.id}

    def hint(self, view: Any) -> Any:
        return np.full(view.table.capacity, 5, np.int32)

    def propose(self, view: Any, g: Any) -> Any:
        from presage.core.plan import Draft
        from presage.simulate.oracle import synthetic_base

        chains = []
        for slot, n in zip(g.slot.tolist(), g.draft.tolist()):
            known = int(view.table.known[slot])
            ids = synthetic_ids(synthetic_base(self.base[slot]), known, known + n)
            chains.append([i if (known + j) % 4 else 1 for j, i in enumerate(ids.tolist())])
        return Draft.chains(chains)
        yield

    def advance(self, new: Any) -> None: ...
    def rewind(self, slot: int, known: int) -> None: ...
    def fork(self, src: int, dst: int, req: Request) -> None: ...
    def close(self, slot: int) -> None: ...


def test_drafts_come_true_where_they_are_right() -> None:
    plain = simulate(config(), trace(20), target())

    def accepted(**kw: Any) -> float:
        out = Collector()
        replica = make_replica(config(), target(), out, parts={"drafter": Guess, "length": AllIn}, max_drafts=64, **kw)
        VirtualDriver([replica], trace(20)).run()
        stats, rows = replica.loop.stats, out.rows.table()
        assert sorted(out.ids) == sorted(plain.ids) and rows["n_out"].sum() == plain.requests["n_out"].sum()
        assert replica.loop.steps < plain.n_steps
        return stats["accepted"] / stats["drafted"]

    # Every fourth position is wrong, and the step after it begins behind it: three of five come true, fewer where a text ends.
    assert 0.55 < accepted() < 0.61
    # Chains of five at nine in ten: (0.9 + ... + 0.9 ** 5) / 5.
    assert 0.69 < accepted(oracle=lambda: LawOracle(rate=0.9)) < 0.78


@pytest.mark.parametrize("level", ["shape", "tokens"])
def test_a_recorded_simulation_replays(tmp_path: Path, level: str) -> None:
    t, setting = target(60), config()
    log = DecisionLog(tmp_path, level, header=log_header(setting, t.geometry, t.layers, [], t.max_model_len))
    parts: dict[str, Any] = {"log": lambda: log}
    if level == "shape":
        parts["content"] = lambda: NamedContent(HashedContent(), log)
    out = Collector()
    replica = make_replica(setting, t, out, parts=parts)
    driver = VirtualDriver([replica], trace())
    driver.post(1.5, 0, Abort("r20"))
    driver.run()
    log.shut()
    assert out.rows.table()["preemptions"].sum() > 0
    assert replay(tmp_path) == replica.loop.steps > 100


def test_workload_out_of_order_is_refused() -> None:
    requests = list(trace(5))[::-1]
    with pytest.raises(ConfigError, match="before the one ahead"):
        simulate(config(), requests, target())


def test_refused_requests_count_as_failed() -> None:
    big = Requests(Workload("r", np.array([0.0, 0.1]), np.array([5000, 10]), np.array([4, 4])))
    r = simulate(config(), big, target())
    assert r.errors == {0: "context_length_exceeded"} and np.isinf(r.ttft[0]) and np.isfinite(r.ttft[1])
