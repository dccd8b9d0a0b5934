"""The loop under random arrivals, aborts, faults, tiny pools and drafts: every request ends once with the right ids, nothing leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.config import SchedulerConfig
from presage.core.events import Abort, Arrive, Drain, Pause, Resume, Waited, Watch
from presage.core.plan import Draft, Grants, Keep
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.core.types import Kind, State, Wait
from presage.engine.null import NullExecutor, null_geometry
from presage.schedule.fcfs import Fcfs
from tests.pure.loops import Bench


def rule(slot: int, position: int) -> int:
    """Ids that depend on the position alone, so a lone request and a batched one must agree."""
    return 10 + (position * 7) % 50


def expected(prompt: int, tokens: int) -> list[int]:
    return [rule(0, prompt + i) for i in range(tokens)]


class NoisyDrafter:
    """Trees of right and wrong guesses: a right chain with wrong siblings in front of it."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}

    def open(self, slot: int, req: Request) -> None:
        self.lengths[slot] = len(req.prompt) + len(req.emitted)

    def advance(self, new: Any) -> None:
        for s, n in zip(new.slot.tolist(), np.diff(new.off).tolist()):
            self.lengths[s] += n

    def rewind(self, slot: int, known: int) -> None:
        self.lengths[slot] = known

    def fork(self, src: int, dst: int, req: Request) -> None:
        self.lengths[dst] = self.lengths[src]

    def close(self, slot: int) -> None:
        del self.lengths[slot]

    def hint(self, view: Any) -> Any:
        return np.full(view.table.capacity, 5, np.int32)

    def propose(self, view: Any, g: Grants) -> Any:
        offset, token, parent, depth = [0], [], [], []
        for slot, n in zip(g.slot.tolist(), g.draft.tolist()):
            known, node = int(view.table.known[slot]), -1
            for j in range(0, n - 1, 2):
                token += [999, rule(slot, known + j // 2)]
                parent += [node, node]
                depth += [j // 2 + 1] * 2
                node = j + 1
            offset.append(len(token))
        a = [np.array(x, np.int32) for x in (offset, token, parent, depth)]
        return Draft(*a, np.ones(len(token), np.float32))
        yield


class AllIn:
    """Wants everything the drafter hints at."""

    def ask(self, view: Any, hint: Any) -> Any:
        return hint

    def select(self, view: Any, g: Any, draft: Any) -> Keep:
        return Keep(np.ones(len(draft), bool), np.zeros(len(g), bool))

    def observe(self, facts: Any) -> None:
        """Learns nothing."""


def test_lone_request() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule), max_num_batched_tokens=32)
    b.add("a", 70, max_tokens=9)
    b.drain()
    assert b.output("a") == expected(70, 9) and b.finishes("a") == [(0, "length")]


def test_eos_and_min_tokens() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=lambda s, p: 2 if p % 5 == 0 else 9), eos=(2,))
    b.add("a", 8, max_tokens=30)
    b.add("b", 8, max_tokens=30, min_tokens=4)
    b.add("c", 8, max_tokens=30, ignore_eos=True)
    b.drain()
    assert b.output("a") == [9, 9, 2] and b.output("b") == [9, 9, 2, 9, 9, 9, 9, 2] and len(b.output("c")) == 30
    assert [e.stop for e in b.emissions if e.finish and e.id == "a"] == [2]


@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(14, 40),
    windows=st.sampled_from([(0,), (0, 40), (40,)]),
    ahead=st.booleans(),
    drafts=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority", "layered"]),
)
@settings(max_examples=60, deadline=None)
def test_everything_ends_once(seed: int, blocks: int, windows: tuple[int, ...], ahead: bool, drafts: bool, policy: str) -> None:
    rng = np.random.default_rng(seed)
    kw: dict[str, Any] = {"drafter": NoisyDrafter(), "length": AllIn(), "max_drafts": 64} if drafts else {}
    b = Bench(
        blocks,
        executor=NullExecutor(null_geometry(blocks, windows=windows), rule=rule, manual=True),
        windows=windows,
        max_len=300,
        max_num_batched_tokens=int(rng.integers(8, 80)),
        max_num_seqs=int(rng.choice([1, 3, 5, 24])),
        async_scheduling=ahead,
        scheduling_policy=policy,
        **kw,
    )
    b.kv = b.loop.kv
    want: dict[str, tuple[int, int, int]] = {}
    aborted: set[str] = set()
    for turn in range(60):
        for k in range(int(rng.choice([0, 0, 1, 12], p=[0.3, 0.4, 0.26, 0.04])) if len(want) < 30 else 0):
            prompt, tokens, n = int(rng.integers(1, 200)), int(rng.integers(1, 40)), int(rng.choice([1, 1, 3]))
            want[name := f"r{turn}-{k}"] = (prompt, tokens, n)
            b.add(name, prompt, max_tokens=tokens, n=n, priority=int(rng.integers(0, 3)))
        if want and rng.random() < 0.08:
            aborted.add(name := str(rng.choice(sorted(want))))
            b.turn(Abort(name))
        if b.executor.submitted and rng.random() < 0.8:
            b.executor.finish()
        b.turn()
    for _ in range(3000):
        if b.loop.idle:
            break
        if b.executor.submitted:
            b.executor.finish()
        b.turn()
    assert b.loop.idle
    b.loop.receiver.audit()
    assert b.loop.stats["policy_errors"] == 0
    for name, (prompt, tokens, n) in want.items():
        assert sorted(x for x, _ in b.finishes(name)) == list(range(n)), (name, b.finishes(name))
        for branch, why in b.finishes(name):
            out = b.output(name, branch)
            assert out == expected(prompt, tokens)[: len(out)]
            assert (why == "length" and len(out) == min(tokens, 300 - prompt)) or name in aborted


def test_faults_end_their_requests_only() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule), max_num_batched_tokens=40, max_num_seqs=4)
    b.executor.fail = {3}
    for i in range(3):
        b.add(f"r{i}", 20 + i, max_tokens=12)
    b.drain()
    b.loop.receiver.audit()
    whys = [b.finishes(f"r{i}")[0][1] for i in range(3)]
    assert "error" in whys
    b.add("later", 30, max_tokens=5)
    b.drain()
    assert b.output("later") == expected(30, 5)


def test_refusals() -> None:
    b = Bench(blocks=8, max_len=200, max_waiting=2, max_num_seqs=1)
    b.add("long", 250, max_tokens=4)
    assert b.emissions[-1].error[0] == "context_length_exceeded"
    b2 = Bench(blocks=4, max_len=200)
    b2.add("fat", 150, max_tokens=40)
    assert b2.emissions[-1].error[0] == "kv_cache_too_small"
    manual = Bench(executor=NullExecutor(null_geometry(64), manual=True), max_waiting=2, max_num_seqs=1)
    for i in range(5):
        manual.add(f"q{i}", 5, max_tokens=4)
    assert [e.error[0] for e in manual.emissions if e.error] == ["queue_full"] * 2
    manual.turn(Drain())
    manual.add("no", 5, max_tokens=4)
    assert manual.emissions[-1].error[0] == "draining"


def test_waits_and_deadlines() -> None:
    b = Bench()
    req = Request(id="g", prompt=np.arange(5, dtype=np.int32), sampling=SamplingParams(max_tokens=3))
    b.turn(Arrive(req, Wait.GRAMMAR))
    for _ in range(3):
        b.turn()
    assert not b.emissions
    b.turn(Waited("g", Wait.GRAMMAR))
    b.drain()
    assert len(b.output("g")) == 3
    b.turn(Arrive(Request(id="h", prompt=req.prompt, sampling=req.sampling), Wait.GRAMMAR))
    b.turn(Waited("h", Wait.GRAMMAR, ("invalid_grammar", "no", 400)))
    assert b.finishes("h") == [(0, "error")]
    b.turn(Arrive(Request(id="late", prompt=req.prompt, sampling=req.sampling, due_first=b.now + 0.002), Wait.GRAMMAR))
    b.turn(), b.turn(), b.turn()
    assert b.emissions[-1].error[0] == "deadline_missed"
    b.drain()
    b.loop.receiver.audit()


def test_pause_resume_and_watch() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule))
    b.add("a", 10, max_tokens=20)
    slot = b.loop.receiver.by_id["a"][0]
    b.turn()
    b.loop.programs.command(Pause(slot))
    for _ in range(4):
        b.turn()
    held = len(b.output("a"))
    assert b.loop.table.state[slot] == State.HELD
    b.turn()
    assert len(b.output("a")) == held
    b.loop.programs.command(Resume(slot))
    b.drain()
    assert b.output("a") == expected(10, 20)
    assert Watch(slot, 3).out == 3


def test_prefix_hits_are_used_and_exact() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule), max_num_batched_tokens=64)
    b.add("a", 130, max_tokens=4)
    b.drain()
    b.add("b", 130, max_tokens=4)
    b.add("salted", 130, max_tokens=4, salt=b"x")
    b.drain()
    cached = {e.id: e.n_cached for e in b.emissions if e.finish}
    assert cached == {"a": 0, "b": 128, "salted": 0} and b.output("b") == b.output("a")


def test_a_burst_with_one_prefix_computes_it_once() -> None:
    """Those far behind in the queue are let in with the prefix that others published since they arrived."""
    b = Bench(blocks=2000, max_num_seqs=100, max_num_batched_tokens=2048)
    prompts = [np.array([7, 8, 9] * 100 + [i] * 20, np.int32) for i in range(100)]
    b.turn(*(Arrive(Request(id=str(i), prompt=x, sampling=SamplingParams(max_tokens=4, ignore_eos=True))) for i, x in enumerate(prompts)))
    b.drain()
    cached = [e.n_cached for e in b.emissions if e.finish]
    assert (cached.count(288), cached.count(0)) == (87, 13)  # two steps of them were let in before the first blocks were there


def test_embeddings_end_without_tokens() -> None:
    b = Bench(max_num_batched_tokens=16)
    b.add("e", 50, kind=Kind.EMBED)
    b.drain()
    assert b.finishes("e") == [(0, "done")] and b.output("e") == []


class Liar(Fcfs):
    """Grants more than a request lacks."""

    def plan(self, view: Any, budget: Any) -> Grants:
        g = super().plan(view, budget)
        g.tokens = g.tokens + 1
        return g


class Raiser(Fcfs):
    """Fails."""

    def plan(self, view: Any, budget: Any) -> Grants:
        raise RuntimeError("no")


class Lazy(Fcfs):
    """Grants nothing."""

    def plan(self, view: Any, budget: Any) -> Grants:
        return Grants.of([], [], view.layers)


@pytest.mark.parametrize("policy", [Liar, Raiser, Lazy])
def test_a_broken_policy_costs_steps_not_requests(policy: type) -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule), scheduler=policy(SchedulerConfig()))
    b.add("a", 40, max_tokens=6)
    b.add("b", 30, max_tokens=6)
    b.drain()
    assert b.output("a") == expected(40, 6) and b.output("b") == expected(30, 6)


def test_layered_prefill_climbs_the_staircase() -> None:
    settings = {"scheduling_policy": "layered", "scheduling_config": {"work": 50}, "max_num_batched_tokens": 256}
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule, layers=8), **settings)
    b.add("short", 5, max_tokens=30)
    b.turn()
    b.add("long", 200, max_tokens=3)
    seen = set()
    for _ in range(60):
        for flight in b.loop.flight.values():
            seen |= set(zip(flight.plan.layer0.tolist(), flight.plan.layer1.tolist()))
        b.turn()
    assert {(0, 2), (2, 4), (4, 6), (6, 8), (0, 8)} <= seen
    assert b.output("long") == expected(200, 3) and b.output("short") == expected(5, 30)
    b.loop.receiver.audit()


class Companioned(Fcfs):
    """Keeps lane 1 (a second model) close behind the lead lane."""

    def plan(self, view: Any, budget: Any) -> Grants:
        g = super().plan(view, budget)
        t = view.table
        lag = [(s, int(t.known[s] - 1 - t.computed[s, 1])) for s in view.ready.tolist() if t.inflight[s] == 0]
        lag = [(s, min(n, 16)) for s, n in lag if n > 0]
        more = Grants.of([s for s, _ in lag], [n for _, n in lag], view.layers)
        more.lane[:] = 1
        for name in ("slot", "tokens", "draft", "start", "lane", "layer0", "layer1"):
            setattr(g, name, np.concatenate([getattr(more, name), getattr(g, name)]))
        return g


def test_a_lagging_lane_is_caught_up_by_its_own_passes() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=rule), scheduler=Companioned(SchedulerConfig()), lanes=2, async_scheduling=False)
    b.add("a", 60, max_tokens=20)
    b.add("b", 30, max_tokens=25)
    slot, seen = b.loop.receiver.by_id["a"][0], []
    for _ in range(80):
        b.turn()
        if "a" in b.loop.receiver.by_id:
            seen.append(tuple(b.loop.table.computed[slot, :2].tolist()))
    b.drain()
    assert b.output("a") == expected(60, 20) and b.output("b") == expected(30, 25)
    assert seen[-1][1] > 60 and seen[-1][0] - seen[-1][1] < 20, seen
    b.loop.receiver.audit()
    assert all(kv.usage()["used"] == 0 for kv in b.loop.lanes)


@pytest.mark.parametrize("thinks", [3, 50])
def test_thinking_budget_closes_the_thinking(thinks: int) -> None:
    end = 5
    b = Bench(executor=NullExecutor(null_geometry(64), rule=lambda s, p: end if p == 10 + thinks else 9))
    req = Request(
        id="t", prompt=np.arange(10, 20, dtype=np.int32), sampling=SamplingParams(max_tokens=30, thinking_budget=8), extras={"thinking_end_id": end}
    )
    b.turn(Arrive(req))
    b.drain()
    out = b.output("t")
    assert len(out) == 30 and out.index(end) == min(thinks, 8) and b.finishes("t") == [(0, "length")]
    b.loop.receiver.audit()


def test_ids_injected_at_the_end_never_follow_the_finish() -> None:
    b = Bench(executor=NullExecutor(null_geometry(64), rule=lambda s, p: 9))
    req = Request(
        id="t", prompt=np.arange(10, 20, dtype=np.int32), sampling=SamplingParams(max_tokens=8, thinking_budget=8), extras={"thinking_end_id": 5}
    )
    b.turn(Arrive(req))
    b.drain()
    assert b.output("t") == [9] * 8 and b.emissions[-1].finish == "length"
