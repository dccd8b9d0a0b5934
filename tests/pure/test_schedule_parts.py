"""The parts beside the policies: the trained ranker, Kendall's tau, nano-batch overlap, prefill layouts, dispatch, step-time learning, forecasts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.null import null_geometry
from presage.schedule import ltr_train
from presage.schedule.budget import peak
from presage.schedule.deadline import stage_budget
from presage.schedule.dispatch import BalancedDispatch, tune_alpha
from presage.schedule.kendall import kendall_tau
from presage.schedule.ltr import Ltr
from presage.schedule.overlap import COMPUTE, LINEAR, MEMORY, NETWORK, SHARED, Curve, Operation, Overlapped, cut_evenly, makespan, search
from presage.schedule.pace import Pace, mixed
from presage.schedule.prepacking import LAYOUTS, first_fit_decreasing, layouts, prefill_seconds
from presage.schedule.splits import Splits
from presage.simulate.collect import Collector
from presage.simulate.driver import Replica, VirtualDriver
from presage.simulate.latency.hardware import hardware
from presage.simulate.latency.roofline import Roofline
from presage.simulate.oracle import synthetic_ids
from presage.simulate.run import Target, make_replica
from presage.simulate.shape import ModelShape
from tests.pure.policy_kit import bench_of, settle
from tests.pure.test_schedule_directions import DENSE

LARGE = DENSE | {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80, "intermediate_size": 28672, "vocab_size": 32000}

# ---- learning to rank


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
def test_tau_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(c, np.float64) for c in zip(*pairs))
    agree = ties_x = ties_y = 0
    for i in range(len(x)):
        for j in range(i):
            a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
            agree, ties_x, ties_y = agree + a * b, ties_x + (a == 0 and b != 0), ties_y + (b == 0 and a != 0)
    both = sum((np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])) != 0 for i in range(len(x)) for j in range(i))
    norm = np.sqrt((both + ties_x) * (both + ties_y))
    assert kendall_tau(x, y) == pytest.approx(agree / norm if norm else 0.0)


def test_list_mle_gradient() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal(9), rng.integers(0, 4, 9).astype(np.float64)
    loss, grad = ltr_train.list_mle(scores, labels)
    for i in range(9):
        step = np.eye(9)[i] * 1e-6
        slope = (ltr_train.list_mle(scores + step, labels)[0] - ltr_train.list_mle(scores - step, labels)[0]) / 2e-6
        assert grad[i] == pytest.approx(slope, abs=1e-6)
    # The true order is the most likely one.
    assert ltr_train.list_mle(labels, labels)[0] < loss


def test_a_trained_ranker_orders_prompts_it_never_saw(tmp_path: Path) -> None:
    prompts, lengths = ltr_train.told_lengths(900)
    ranker = ltr_train.train(prompts, lengths, epochs=15)
    fresh, truth = ltr_train.told_lengths(300, seed=1)
    tau = kendall_tau(-ranker.score(fresh), truth.astype(np.float64))
    assert tau > 0.7 and abs(tau - ranker.tau) < 0.2
    for other in ("mse", "buckets"):
        rival = ltr_train.train(prompts, lengths, other, epochs=15)
        assert kendall_tau(-rival.score(fresh), truth.astype(np.float64)) < tau + 0.02
    ranker.save(tmp_path / "r.npz")
    again = ltr_train.LinearRanker.load(tmp_path / "r.npz")
    np.testing.assert_array_equal(again.score(fresh), ranker.score(fresh))
    policy = Ltr(model=str(tmp_path / "r.npz"))
    short, long = int(np.argmax(ranker.score(fresh))), int(np.argmin(ranker.score(fresh)))
    _, b = bench_of(policy, blocks=64, max_num_seqs=1)
    b.add("running", 20, max_tokens=20)
    b.turn()
    for name, which in (("long", long), ("short", short)):
        b.add(name, fresh[which].tolist(), max_tokens=3)
    settle(b)
    assert [e.id for e in b.emissions if e.finish].index("short") < [e.id for e in b.emissions if e.finish].index("long")
    with pytest.raises(ConfigError, match="not a ranker"):
        ltr_train.LinearRanker.load(tmp_path / "none.npz")


def test_a_ranker_gone_stale_falls_back_to_arrival_order() -> None:
    policy = Ltr(noise=0.0)
    policy._said = [(float(i), -i) for i in range(300)]
    policy._news = 300
    _, b = bench_of(policy, blocks=40, manual=False, max_num_seqs=1)
    b.add("first", 10, max_tokens=2)
    b.add("long", 10, max_tokens=30)
    b.add("short", 10, max_tokens=2)
    settle(b)
    assert policy.tau is not None and policy.tau < -0.9
    assert [e.id for e in b.emissions if e.finish] == ["first", "long", "short"]


# ---- overlap of operations

MEASURED = (
    (COMPUTE, 16.1), (MEMORY, 35.6), (COMPUTE, 4.6), (COMPUTE, 16.0), (NETWORK, 23.95), (COMPUTE, 69.9), (COMPUTE, 35.0), (NETWORK, 23.95),
)  # fmt: skip
"""Milliseconds of NanoFlow's operations: LLaMA-2-70B on eight A100, 2048 rows."""


def plan(operations: Any, curve: Curve = SHARED) -> Any:
    chain = [Operation(r, s) for r, s in operations]
    return search(lambda cuts: cut_evenly(chain, cuts), curve)


def test_overlap_gains_what_the_paper_found_and_nothing_without_its_reason() -> None:
    found = plan(MEASURED)
    assert found.sequential == pytest.approx(225.1) and 1.15 < found.gain < 1.35 and len(found.cuts) >= 1
    assert plan(MEASURED, LINEAR).gain == 1.0
    light = [(r, s if r == COMPUTE else s / 10) for r, s in MEASURED if r != NETWORK]
    assert plan(light).gain == 1.0


def test_makespan_of_one_chain_is_its_sum_and_never_below_its_busiest_resource() -> None:
    chain = [Operation(r, s) for r, s in MEASURED]
    share = {MEMORY: 0.4, NETWORK: 0.2}
    assert makespan([chain], share, 3) == pytest.approx(3 * 225.1)
    split = makespan(cut_evenly(chain, (0.5,), 0.0), share, 3)
    assert 3 * sum(s for r, s in MEASURED if r == COMPUTE) < split < 3 * 225.1


def test_overlapped_steps_are_priced_lower_only_where_they_are_large() -> None:
    base = Roofline(ModelShape.of(LARGE), hardware("a100-80"), tp=8)
    model = Overlapped(base, 80)
    large, small = mixed(1200, 1200 * 700, 848), mixed(100, 70000, 0)
    gain = base.predict(large)[0, 0] / model.predict(large)[0, 0]
    assert 1.1 < gain < 1.35
    assert model.predict(small)[0, 0] == base.predict(small)[0, 0]
    assert Overlapped(base, 80, curve=LINEAR).predict(large)[0, 0] == base.predict(large)[0, 0]


def test_splits_are_tile_boundaries_of_full_batches() -> None:
    policy = Splits(tile=128, least=512)
    assert policy.boundaries(2048).tolist() == [768] and policy.boundaries(1024).tolist() == [384] and not len(policy.boundaries(511))
    with pytest.raises(ValueError, match="rise between"):
        Splits(at=(0.5, 0.25))
    small = Splits(tile=4, least=8)
    seen = []
    watched, b = bench_of(small, blocks=40, max_num_batched_tokens=32)
    watched.observe = lambda facts: seen.append((int(facts.plan.rows[-1]), facts.grants.splits.tolist()))  # type: ignore[method-assign]
    for i in range(3):
        b.add(f"r{i}", 60, max_tokens=3)
    settle(b)
    assert (32, [12]) in seen and all(not cuts for rows, cuts in seen if rows < 8)


# ---- layouts of a prefill


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_packing_places_every_prompt_once(lengths: list[int]) -> None:
    top = max(lengths)
    rows = first_fit_decreasing(lengths, top)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= top for row in rows)
    # First fit decreasing never takes more than 11/9 of the least number of rows and one; the volume bounds that number from below.
    assert len(rows) <= 11 / 9 * max(1, sum(x > top / 2 for x in lengths), -(-sum(lengths) // top)) * 1.5 + 1
    slots = {kind: sum(p.slots for p in layouts(lengths, kind)) for kind in LAYOUTS}
    assert slots["ragged"] == sum(lengths) <= slots["prepacked"] <= slots["padded"]


def test_ragged_rows_make_prepacking_free() -> None:
    rng = np.random.default_rng(0)
    latency = Roofline(ModelShape.of(DENSE), hardware("a100-80"))
    packed, padded = [], []
    for _ in range(100):
        lengths = np.maximum(1, rng.lognormal(4.5, 0.9, 16)).astype(int).tolist()
        of = {kind: layouts(lengths, kind)[0].slots / sum(lengths) for kind in LAYOUTS}
        packed.append(of["prepacked"])
        padded.append(of["padded"])
    assert 3.1 < np.mean(padded) < 3.9 and 1.05 < np.mean(packed) < 1.2
    took = {kind: prefill_seconds(latency, lengths * 4, kind, 16) for kind in LAYOUTS}
    assert took["ragged"] <= took["prepacked"] < took["sorted"] < took["padded"] and took["padded"] > 2 * took["prepacked"]
    equal = {kind: prefill_seconds(latency, [512] * 16, kind) for kind in LAYOUTS}
    assert equal["padded"] == pytest.approx(equal["ragged"], rel=0.05)
    with pytest.raises(ConfigError, match="unknown layout"):
        layouts([1], "square")


# ---- workflows on unequal instances

STAGES = {"keywords": (300, 20), "candidate": (3000, 150), "evaluate": (600, 10)}
TIMES = {"keywords": [0.4, 1.0], "candidate": [2.6, 8.0], "evaluate": [0.3, 0.8]}


def workflow(route: Callable[[], Any], n: int = 14) -> np.ndarray:
    """End-to-end seconds of queries of three stages on a fast and a slow instance."""
    chosen, ends, order = route(), {}, list(STAGES)

    def call(query: int, stage: int, at: float) -> Request:
        n_in, n_out = STAGES[order[stage]]
        name = f"q{query}-{stage}"
        return Request(
            id=name, prompt=synthetic_ids(7919 * query + stage, 0, n_in), stage=order[stage], arrival=at,
            sampling=SamplingParams(max_tokens=n_out, ignore_eos=True),
        )  # fmt: skip

    out, engines = Collector(), []
    for i, name in enumerate(("h100", "l4")):
        target = Target(Roofline(ModelShape.of(DENSE), hardware(name)), null_geometry(3000), 32, 8192)
        engines.append(make_replica(EngineConfig.of(max_num_seqs=8), target, out, i))

    def after(req: Request, now: float) -> list[Request]:
        query, stage = (int(x) for x in req.id[1:].split("-"))
        ends[query] = now
        return [call(query, stage + 1, now)] if stage + 1 < len(order) else []

    driver = VirtualDriver(engines, [call(i, 0, 0.6 * i) for i in range(n)], chosen, chosen.after(after) if hasattr(chosen, "after") else after)
    driver.run()
    return np.array([ends[i] - 0.6 * i for i in range(n)])


class RoundRobin:
    def __init__(self) -> None:
        self.n = 0

    def __call__(self, request: Request, replicas: list[Replica]) -> int:
        self.n += 1
        return self.n % len(replicas)


def test_balanced_dispatch_beats_round_robin() -> None:
    turns = workflow(RoundRobin)
    balanced = workflow(lambda: BalancedDispatch(TIMES, 0.2))
    assert np.percentile(balanced, 95) < 0.75 * np.percentile(turns, 95)
    best, found = tune_alpha(lambda a: float(np.percentile(workflow(lambda: BalancedDispatch(TIMES, a)), 95)), (0.0, 0.2))
    assert best in (0.0, 0.2) and found <= np.percentile(balanced, 95)


def test_dispatch_takes_finished_work_off() -> None:
    d = BalancedDispatch({"a": [1.0, 2.0]}, 0.0)
    calls = [Request(id=f"c{i}", prompt=synthetic_ids(i, 0, 4), stage="a" if i else None) for i in range(4)]
    assert [d(c, [0, 1]) for c in calls[:3]] == [0, 1, 0] and d.work.tolist() == [2.0, 2.0]
    for c in (*calls, *calls):
        d.ended(c)
    assert not d.work.any()
    with pytest.raises(ValueError, match="alpha"):
        BalancedDispatch({"a": [1.0]}, 2.0)


def test_stage_budgets_divide_what_is_left() -> None:
    times = {"a": 1.0, "b": 3.0}
    assert stage_budget(8.0, "a", ["b", "b", "a"], times) == 1.0
    assert stage_budget(8.0, "b", [], times) == 8.0 and stage_budget(-2.0, "a", ["b"], times) < 0


# ---- step times and forecasts


def test_pace_learns_steps_from_what_it_sees() -> None:
    pace, latency, rng = Pace(), Roofline(ModelShape.of(DENSE), hardware("a100-80")), np.random.default_rng(0)
    view: Any = SimpleNamespace(latency=None)
    assert not pace.known(view)
    for _ in range(200):
        n = float(rng.integers(1, 64))
        f = mixed(n, n * float(rng.integers(100, 2000)), float(rng.choice([0, 256, 1024])))
        plan_ = SimpleNamespace(features=f[0])
        pace.observe(SimpleNamespace(plan=plan_, done=SimpleNamespace(t0=0.0, t1=latency.predict(f)[0, 0])))  # type: ignore[arg-type]
    probe = np.concatenate([mixed(20, 20 * 800, 512), mixed(40, 40 * 1500, 0)])
    assert pace.known(view)
    np.testing.assert_allclose(pace.seconds(view, probe), latency.predict(probe)[:, 0], rtol=0.35)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_peak_is_the_worst_moment(jobs: list[tuple[int, int]]) -> None:
    held, steps = (np.array(c, np.float64) for c in zip(*jobs))
    worst = max(sum(h + t for h, s in jobs if s >= t) for t in range(41))
    assert peak(held, steps, np.zeros(len(held))) == worst
