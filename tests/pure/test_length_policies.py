"""Every length policy: legal masks for any draft, asks within bounds, equal bits after pickling, nothing asked when nothing pays."""

from __future__ import annotations

import pickle
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError, RequestError
from presage.core.plan import Draft, Grants
from presage.core.request import Request
from presage.draft.length import LENGTHS, make_length
from presage.draft.length.wishes import UNCAPPED, cap_of
from presage.engine.null import NullExecutor, null_geometry
from tests.pure.lengths import LAYERS, Known, World, stairs, view_of
from tests.pure.loops import Bench
from tests.pure.test_loop import NoisyDrafter, expected, rule

ADAPTIVE = ["goodput", "marginal"]


def random_draft(rng: np.random.Generator, caps: np.ndarray, sources: int = 3) -> Draft:
    """A forest within (and a little above) ``caps`` with path probabilities that never rise."""
    offset, parent, depth, prob = [0], [], [], []
    for cap in caps.tolist():
        n = int(rng.integers(0, cap + 2))
        mine: list[tuple[int, int, float]] = []
        for j in range(n):
            up = int(rng.integers(-1, j))
            d, p = (1, 1.0) if up < 0 else (mine[up][1] + 1, mine[up][2])
            mine.append((up, d, p * float(rng.choice([rng.random(), 1.0]))))
        parent += [m[0] for m in mine]
        depth += [m[1] for m in mine]
        prob += [m[2] for m in mine]
        offset.append(len(parent))
    ints = [np.array(x, np.int32) for x in (offset, np.arange(len(parent)), parent, depth)]
    return Draft(*ints, np.array(prob, np.float32), rng.integers(0, sources, len(parent)).astype(np.uint8))


def closed(draft: Draft, keep: np.ndarray) -> bool:
    """Every kept node's parent is kept."""
    owner = np.repeat(np.arange(len(draft.offset) - 1), np.diff(draft.offset))
    up = draft.offset[:-1][owner] + draft.parent
    return bool(np.all(~keep | (draft.parent < 0) | keep[np.maximum(up, 0)]))


def kept_per_grant(draft: Draft, keep: np.ndarray) -> np.ndarray:
    return np.bincount(np.repeat(np.arange(len(draft.offset) - 1), np.diff(draft.offset)), keep, len(draft.offset) - 1)


@pytest.mark.parametrize("name", sorted(LENGTHS))
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 20), prompt=st.booleans())
def test_masks_are_closed_and_within_the_grants(name: str, seed: int, batch: int, prompt: bool) -> None:
    rng = np.random.default_rng(seed)
    policy, view = make_length(name), view_of(batch, latency=Known(stairs()))
    hint = rng.integers(0, 9, view.table.capacity).astype(np.int32)
    ask = policy.ask(view, hint)
    assert ask.dtype == np.int32 and (ask >= 0).all() and (ask <= hint).all() and not ask[batch:].any()
    tokens = np.ones(batch, np.int32)
    caps = np.minimum(ask[view.ready], rng.integers(0, 9, batch)).astype(np.int32)
    if prompt:
        tokens[-1], caps[-1], view.gap[batch - 1] = 100, 0, 300
    grants = Grants.of(view.ready, tokens, LAYERS, draft=caps)
    draft = random_draft(rng, caps)
    keep = policy.select(view, grants, draft)
    assert keep.node.shape == (len(draft),) and keep.hold.shape == (batch,) and not keep.hold.any()
    assert closed(draft, keep.node)
    assert (kept_per_grant(draft, keep.node) <= caps).all()


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_pickling_mid_run_changes_nothing(name: str) -> None:
    def trace(pickled: bool) -> list[tuple[Any, ...]]:
        world = World(make_length(name), 6, stairs(free_rows=8, tile=4), seed=3)
        out = []
        for i in range(60):
            if pickled and i % 20 == 7:
                world.policy = pickle.loads(pickle.dumps(world.policy))
            facts = world.step()
            out.append((facts.grants.draft.tolist(), facts.plan.nodes.tolist(), facts.done.path.tolist()))
        return out

    assert trace(False) == trace(True)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_off_path_asks_for_nothing(name: str) -> None:
    """Every row costs as much as a request's own: hopeless drafts stop, but for rare probes."""
    costly = stairs(base=1e-4, tile=1, per_tile=1e-3, free_rows=0)
    world = World(make_length(name), 16, costly, alphas=(0.05,), drafting=2e-4)
    for _ in range(200):
        world.step()
    asked, steps = world.asked, world.steps
    for _ in range(400):
        world.step()
    assert world.asked - asked <= 0.08 * (world.steps - steps)
    assert world.drafted < 0.02 * world.tokens + 400


@pytest.mark.parametrize("name", ADAPTIVE)
def test_drafting_comes_back_when_it_pays(name: str) -> None:
    """Acceptance rises from nothing to nearly all while speculation is off: the probes notice."""
    world = World(make_length(name), 4, stairs(base=1e-3, tile=1, per_tile=5e-4, free_rows=0), alphas=(0.02,), life=50_000)
    for _ in range(300):
        world.step()
    before = world.drafted
    world.right[:], world.claim[:] = 1.0, 0.98
    for _ in range(700):
        world.step()
    late = world.drafted
    for _ in range(100):
        world.step()
    assert world.drafted - late > 300, (before, late, world.drafted)


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_in_the_loop(name: str) -> None:
    """The real loop with a noisy tree drafter: right ids, whatever the policy thinks of the drafts."""
    policy = make_length(name)
    bench = Bench(executor=NullExecutor(null_geometry(64), rule=rule), drafter=NoisyDrafter(), length=policy, max_drafts=64)
    for i in range(5):
        bench.add(f"r{i}", 20 + i, max_tokens=30, ignore_eos=True)
    bench.drain()
    assert all(bench.output(f"r{i}") == expected(20 + i, 30) for i in range(5))
    assert bench.loop.stats["policy_errors"] == 0 and bench.loop.stats["drafted"] > 0


def test_wishes_of_requests() -> None:
    assert cap_of(None) == cap_of({}) == UNCAPPED and cap_of({"method": "none"}) == 0
    assert cap_of({"num_speculative_tokens": 3}) == 3
    for bad in (-1, 2.5, "4", True):
        with pytest.raises(RequestError):
            cap_of({"num_speculative_tokens": bad})
    view = view_of(4)
    hint = np.full(view.table.capacity, 9, np.int32)
    for name in sorted(LENGTHS):
        policy: Any = make_length(name)
        for slot, wish in enumerate([None, {"num_speculative_tokens": 2}, {"method": "none"}, {"num_speculative_tokens": 7}]):
            policy.wishes.open(slot, Request(id=str(slot), prompt=np.arange(3), draft=wish))
        ask = policy.ask(view, hint)
        assert ask[1] <= 2 and ask[2] == 0 and ask[3] <= 7 and ask[0] > 0
        policy.wishes.close(1)
        assert policy.wishes.cap[1] == UNCAPPED
    assert make_length("fixed", num_speculative_tokens=4).ask(view, hint)[0] == 4


def test_fixed_table_by_batch_size() -> None:
    policy = make_length("fixed", num_speculative_tokens=5, table=[[1, 2, 3], [4, 8, 1]])
    for batch, want in ((1, 3), (2, 3), (3, 5), (4, 1), (8, 1), (9, 5)):
        view = view_of(batch)
        ask = policy.ask(view, np.full(view.table.capacity, 9, np.int32))
        assert ask[:batch].tolist() == [want] * batch
    for bad in ([[3, 1, 2]], [[1, 4, 2], [4, 5, 1]], [[1, 2]]):
        with pytest.raises(ConfigError):
            make_length("fixed", table=bad)


class Plain:
    """A policy of somebody else, without options."""

    def ask(self, view: Any, hint: Any) -> Any:
        return hint


def test_policies_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by entry point, and not bothered with the engine's rule if they do not know of it."""
    point = EntryPoint("plain", "tests.pure.test_length_policies:Plain", "presage.lengths")
    monkeypatch.setattr("presage.draft.length.registry.entry_points", lambda group: [point] if group == point.group else [])
    assert type(make_length("plain", rule="rejection")).__name__ == "Plain"


def test_what_may_draft_shares_the_step_with_what_does_not() -> None:
    """Two of forty requests may draft. The other thirty-eight fill the machine, so before drafting a dear drafter is told to do little."""
    machine = Known(stairs(base=1e-3, tile=1, per_tile=1e-3, free_rows=8))
    asks = []
    for batch in (2, 40):
        policy: Any = make_length("marginal", latency=machine, rule="rejection")
        view = view_of(batch)
        hint = np.zeros(view.table.capacity, np.int32)
        hint[:2] = 16
        asks.append(policy.ask(view, hint)[:2].tolist())
    assert min(asks[0]) >= 3 and max(asks[1]) <= 1, asks


def test_registry_names_what_it_knows() -> None:
    with pytest.raises(ConfigError, match="goodput"):
        make_length("nope")
    with pytest.raises(ConfigError, match="colour"):
        make_length("fixed", colour=1)


class Short:
    """A ledger in which every draft token takes a block and few are left."""

    def __init__(self, free: int) -> None:
        self.free = np.array([free])

    def need(self, slots: np.ndarray, upto: np.ndarray) -> np.ndarray:
        return np.maximum(upto - 400, 0)[:, None].astype(np.int64)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_nobody_is_evicted_for_a_guess(name: str) -> None:
    view = view_of(8, known=400)
    view.ledger = Short(10)  # type: ignore[assignment]
    view.free = view.ledger.free
    ask = make_length(name).ask(view, np.full(view.table.capacity, 4, np.int32))
    assert 0 < ask.sum() <= 10
