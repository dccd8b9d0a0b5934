"""Every registered policy through the real loop: legal plans, no starvation, determinism, first come first served among equals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.config import SchedulerConfig
from presage.core.errors import ConfigError
from presage.core.plan import Grants
from presage.schedule import POLICIES, dials_of, make_scheduler, parse_dials
from presage.schedule.fcfs import Fcfs
from tests.pure.policy_kit import bench_of, run_policy, settle, verify

DIALS: dict[str, list[dict[str, Any]]] = {
    "sarathi": [{}, {"tbt": 0.0005, "tile": 4, "floor": 2}],
    "splitfuse": [{}, {"target": 20}],
    "layered": [{}, {"work": 16, "short": 3}],
    "splits": [{"tile": 4, "least": 8}],
    "ltr": [{}, {"noise": 0.5, "margin": 0.2, "cost": 0.002}],
    "shortest": [{}, {"margin": 5.0, "by": "output"}],
    "budget": [{}, {"share": 1.0}],
    "deadline": [{}, {"relegate": False, "margin": 0.0}],
}
"""Dials beside the defaults; tight ones, so that the small runs of the tests reach them."""
CASES = [(name, dials) for name in POLICIES for dials in DIALS.get(name, [{}])]


def make(name: str, dials: dict[str, Any]) -> Any:
    return make_scheduler(SchedulerConfig(scheduling_policy=name, scheduling_config=dials))


@pytest.mark.parametrize(("name", "dials"), CASES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_every_request_ends_and_every_plan_is_legal(name: str, dials: dict[str, Any], seed: int) -> None:
    verify(run_policy(make(name, dials), seed))


@pytest.mark.parametrize(("name", "dials"), CASES)
def test_same_seed_same_plans_also_after_pickling(name: str, dials: dict[str, Any]) -> None:
    first, second = run_policy(make(name, dials), 7), run_policy(make(name, dials), 7, reload=True)
    verify(second)
    assert first.watched.plans == second.watched.plans and len(first.watched.plans) > 40


@pytest.mark.parametrize(("name", "dials"), CASES)
def test_equal_requests_are_served_in_order_of_arrival(name: str, dials: dict[str, Any]) -> None:
    if "noise" in dials:
        pytest.skip("its scores differ by design")
    watched, b = bench_of(make(name, dials), blocks=40, max_num_seqs=2, max_num_batched_tokens=32, enable_prefix_caching=False)
    for i in range(9):
        b.add(f"r{i}", 40, max_tokens=5)
    settle(b)
    starts = [e.id for e in b.emissions if e.ids and e.offset == 0]
    assert starts == [f"r{i}" for i in range(9)] and not watched.broken


FLOOD: dict[str, dict[str, Any]] = {"shortest": {"ageing": 0.0, "patience": 0.3}, "ltr": {"patience": 0.3}, "deadline": {"patience": 0.3}}
FLOOD |= {"cache_aware": {"patience": 0.3}}


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "priority"])
def test_nobody_starves_in_a_flood(name: str) -> None:
    """One request that every order dislikes (long, without hit or deadline), and twice as many favourites as can be served."""
    if name == "ltr":
        policy = make(name, FLOOD[name] | {"noise": 0.0})
    else:
        policy = make(name, FLOOD.get(name, {}))
    _, b = bench_of(policy, blocks=64, manual=False, max_num_seqs=2, max_num_batched_tokens=64)
    for i in range(2):
        b.add(f"a{i}", 33, max_tokens=6)
    b.add("long", [500 + i for i in range(150)], max_tokens=60)
    for i in range(900):
        b.add(f"f{i}", 33, max_tokens=6, due_end=b.now + 10.0)
        b.turn()
        if b.finishes("long"):
            break
    waited = next(e.times[1] - e.times[0] for e in b.emissions if e.id == "long" and e.finish)
    assert waited < 0.45 and b.finishes("long") == [(0, "length")]


def test_the_flood_does_starve_without_a_guard() -> None:
    """The test above can fail: without ageing and patience the long request is never served."""
    _, b = bench_of(make("shortest", {"ageing": 0.0, "patience": 1e9}), blocks=64, manual=False, max_num_seqs=2, max_num_batched_tokens=64)
    for i in range(2):
        b.add(f"a{i}", 33, max_tokens=6)
    b.add("long", [500 + i for i in range(150)], max_tokens=60)
    for i in range(900):
        b.add(f"f{i}", 33, max_tokens=6)
        b.turn()
    assert not b.finishes("long")


def test_priorities_are_never_inverted() -> None:
    rng = np.random.default_rng(1)
    watched, b = bench_of(make("priority", {}), blocks=8, max_num_seqs=3, max_num_batched_tokens=40)
    for i in range(60):
        b.add(f"p{i}", int(rng.integers(5, 90)), max_tokens=int(rng.integers(2, 60)), priority=int(rng.integers(0, 3)))
        if b.executor.submitted:
            b.executor.finish()
        b.turn()
        t, running = b.loop.table, b.loop.running
        held = {s: int(t.priority[s]) for s in running}
        for s in b.loop.queue:
            # Who was evicted is not more important than any who stayed.
            assert not t.preempted[s] or t.priority[s] >= min(held.values(), default=0)
    settle(b)
    assert b.loop.stats["preemptions"] > 0 and not watched.broken


class Greedy(Fcfs):
    """Breaks the rules the kit looks for, one by one."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def plan(self, view: Any, budget: Any) -> Grants:
        g = super().plan(view, budget)
        if self.fault == "order" and len(view.queue) > 1 and len(g) and g.slot[-1] == view.queue[0]:
            g.slot = np.r_[g.slot[:-1], view.queue[-1:]]
            g.tokens = np.r_[g.tokens[:-1], np.int32(1)]
        if self.fault == "evict" and len(view.ready) and view.step % 7 == 0:
            g.evict = np.array([s for s in g.slot if s in view.ready][:1], np.int32)
        if self.fault == "table":
            view.table.priority[0] += 1
        return g


@pytest.mark.parametrize("fault", ["order", "evict", "table"])
def test_the_kit_finds_what_is_broken(fault: str) -> None:
    watched, b = bench_of(Greedy(fault), blocks=40, max_num_seqs=2, max_num_batched_tokens=32)
    for i in range(6):
        b.add(f"r{i}", 20 + i, max_tokens=5)
    settle(b)
    assert watched.broken


def test_names_and_dials() -> None:
    assert dials_of(Fcfs) == {}
    with pytest.raises(ConfigError, match="known: budget, cache_aware"):
        make("no such", {})
    with pytest.raises(ConfigError, match="has no dial speed; it has: tbt, tile"):
        make("sarathi", {"speed": 1})
    with pytest.raises(ConfigError, match="tile and floor"):
        make("sarathi", {"tile": 0})
    with pytest.raises(ConfigError, match="no JSON"):
        parse_dials("{")
    with pytest.raises(ConfigError, match="JSON object"):
        parse_dials("[1]")
    made = make_scheduler(SchedulerConfig(scheduling_policy="splitfuse", scheduling_config='{"target": 64}'))
    assert made.target == 64 and parse_dials(None) == parse_dials("") == {}  # type: ignore[attr-defined]
