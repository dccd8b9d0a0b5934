"""What the policies are made of: step time, overhead, acceptance by position and by claim, the scan."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.plan import Draft, Facts, Grants
from presage.core.types import EMPTY
from presage.draft.length.acceptance import Acceptance
from presage.draft.length.levels import chain_depths, level_curve
from presage.draft.length.overhead import Overhead
from presage.draft.length.positions import Positions
from presage.draft.length.scan import FEATURES, Batch, best_nodes
from presage.draft.length.steptime import StepTime
from presage.engine.kernels import mark
from tests.pure.lengths import LAYERS, Known, facts_of, features_of, stairs


def features(rows: float, batch: int = 8, context: int = 500) -> np.ndarray:
    """A decoding step with ``rows`` rows over ``batch`` spans."""
    f = np.zeros(FEATURES)
    f[0] = f[5] = rows
    f[1] = f[2] = batch
    f[4], f[6], f[7], f[8] = rows - batch, batch * context, rows * context, 1.0
    return f


def trained(seed: int, steps: int = 1500, outliers: float = 0.01, first: float = 3.0) -> tuple[StepTime, Any]:
    """A model that saw steps of a machine with tiles of eight rows, noise, a slow first step and rare pauses."""
    machine, model, rng = stairs(tile=8, per_tile=1e-3, free_rows=16), StepTime(), np.random.default_rng(seed)
    for i in range(steps):
        f = features(float(rng.integers(8, 100)), context=int(rng.integers(100, 2000)))
        seconds = float(machine(f[None])[0]) * float(np.exp(rng.normal(0, 0.02)))
        seconds *= 20.0 if rng.random() < outliers else 1.0
        model.learn(f, first if i == 0 else seconds)
    return model, machine


def test_steptime_learns_steps_through_noise_pauses_and_a_slow_start() -> None:
    model, machine = trained(0)
    grid = np.stack([features(r) for r in range(8, 100)])
    error = np.abs(model.predict(grid)[:, 0] / machine(grid) - 1)
    assert np.median(error) < 0.02 and np.quantile(error, 0.95) < 0.05 and error.max() < 0.15
    jump = model.predict(np.stack([features(32), features(33)]))[:, 0]
    assert jump[1] - jump[0] > 0.6e-3, "one row more than a tile costs a tile"


def test_steptime_follows_a_lasting_change_but_not_a_pause() -> None:
    model, _ = trained(1)
    f = features(40)
    before = float(model.predict(f[None])[0, 0])
    model.learn(f, before * 50)
    assert float(model.predict(f[None])[0, 0]) < 1.15 * before
    for _ in range(60):
        model.learn(f, before * 3)
    assert abs(float(model.predict(f[None])[0, 0]) / (before * 3) - 1) < 0.1


def test_steptime_forgets_a_compilation_at_once() -> None:
    """Every row count's first step compiles something for seconds; the second one of each is believed."""
    machine, model = stairs(tile=8, per_tile=1e-3, free_rows=16), StepTime()
    for slow in (2000.0, 1.0, 1.0):
        for rows in range(8, 24):
            f = features(rows)
            model.learn(f, slow * float(machine(f[None])[0]))
    grid = np.stack([features(r) for r in range(8, 24)])
    assert np.abs(model.predict(grid)[:, 0] / machine(grid) - 1).max() < 0.25


def test_steptime_is_never_negative_rounds_to_microseconds_and_pickles() -> None:
    model, _ = trained(2, steps=200)
    grid = np.random.default_rng(0).uniform(0, 5000, (200, FEATURES))
    seconds = model.predict(grid)[:, 0]
    assert (seconds > 0).all() and np.allclose(seconds * 1e6, np.rint(seconds * 1e6), atol=1e-6)
    other = pickle.loads(pickle.dumps(model))
    other.learn(grid[0], 0.01)
    model.learn(grid[0], 0.01)
    assert (other.predict(grid) == model.predict(grid)).all()


def drafted(ask: int, t0: float, t1: float, decode: bool = True) -> Facts:
    grants = Grants.of([0, 1], [1, 1] if decode else [50, 50], LAYERS, draft=[ask, ask])
    facts = facts_of(grants, Draft.none(2), np.array([100, 100], np.int32), np.zeros(3, np.int32), EMPTY, t0, t1)
    if not decode:
        facts.plan.features[2] = 0.0
    return facts


def test_overhead_prices_depth_and_ignores_idle_time() -> None:
    """Two hundred microseconds a step, a millisecond per level; now and then an hour without requests."""
    model, now, rng = Overhead(), 0.0, np.random.default_rng(0)
    for i in range(400):
        ask = int(rng.integers(0, 5))
        idle = i % 10 == 9
        now += 3600.0 if idle else 2e-4 + 1e-3 * ask
        model.observe(drafted(ask, now, now + 4e-3, decode=not idle))
        now += 4e-3
    for ask in range(5):
        assert abs(model.seconds(2 if ask else 0, ask) - (2e-4 + 1e-3 * ask)) < 1.5e-4


def chain_facts(slots: np.ndarray, length: int, accepted: np.ndarray, prob: float = 0.5, source: int = 0) -> Facts:
    """Chains of ``length`` for ``slots`` of which the first ``accepted`` [n] nodes were accepted."""
    n = len(slots)
    draft = Draft.chains([[0] * length] * n)
    draft.prob = (prob**draft.depth).astype(np.float32)
    draft.source = np.full(len(draft), source, np.uint8)
    off = np.concatenate([[0], np.cumsum(accepted)]).astype(np.int32)
    path = np.concatenate([np.arange(a, dtype=np.int32) for a in accepted] + [EMPTY])
    return facts_of(Grants.of(slots, np.ones(n, np.int32), LAYERS), draft, np.full(n, 100, np.int32), off, path, 0.0, 1e-3)


def accepted_lengths(rng: np.random.Generator, alpha: np.ndarray, length: int) -> np.ndarray:
    return np.array([int(np.argmin(np.append(rng.random(length) < a, False))) for a in alpha])


def test_positions_measure_what_was_judged_only() -> None:
    """Conditional rates .9, .6, .3: censoring at short drafts must not drag far positions down."""
    rng, model, rates = np.random.default_rng(0), Positions(), (0.9, 0.6, 0.3)
    slots = np.arange(16, dtype=np.int32)
    for i in range(200):
        length = 3 if i % 4 == 0 else 1
        hits = rng.random((16, 3)) < rates
        model.observe(chain_facts(slots, length, np.minimum(hits.cumprod(1).sum(1), length)))
    assert np.abs(model.rate[:3] - rates).max() < 0.06
    assert model.rate[2] < 0.4 < model.rate[1]


def test_positions_tell_requests_apart_and_forget() -> None:
    rng, model = np.random.default_rng(0), Positions()
    alpha = np.repeat([0.2, 0.9], 4)
    slots = np.arange(8, dtype=np.int32)
    for _ in range(100):
        model.observe(chain_facts(slots, 4, accepted_lengths(rng, alpha, 4)))
    _, first = model.curves(slots, np.ones(8, np.int32))
    assert first[:4].max() < 0.45 and first[4:].min() > 0.75
    for _ in range(3000):
        model.fade()
    assert np.abs(model.offset).max() < 0.02
    model.reset(slots[:1])
    assert model.offset[0] == 0.0


def test_acceptance_is_calibrated_by_source_and_never_rises_along_a_path() -> None:
    """Source 0 claims .9 and gets .5; source 1 claims .3 and gets .8."""
    rng, model = np.random.default_rng(0), Acceptance()
    slots = np.arange(8, dtype=np.int32)
    for _ in range(150):
        model.observe(chain_facts(slots, 3, accepted_lengths(rng, np.full(8, 0.5), 3), 0.9, 0))
        model.observe(chain_facts(slots, 3, accepted_lengths(rng, np.full(8, 0.8), 3), 0.3, 1))
    for source, claim, truth in ((0, 0.9, 0.5), (1, 0.3, 0.8)):
        draft = chain_facts(slots, 3, np.zeros(8, int), claim, source).plan.draft
        path = model.path(slots + 20, draft).reshape(8, 3)
        assert np.abs(path[:, 0] - truth).max() < 0.08 and np.abs(path[:, 2] - truth**3).max() < 0.12
        assert (np.diff(path, axis=1) <= 0).all()
    claims = np.linspace(0, 1, 50, dtype=np.float32)
    many = Draft(np.arange(51, dtype=np.int32), np.zeros(50, np.int32), np.full(50, -1, np.int32), np.ones(50, np.int32), claims)
    assert (np.diff(model.path(np.full(50, 30, np.int32), many)) >= -1e-6).all(), "a higher claim never means a lower estimate"


def test_siblings_are_judged_but_children_of_losers_are_not() -> None:
    """Tree a(b), c(d): c was accepted, d not. b says nothing; a failed, c succeeded, d failed."""
    draft = Draft(*(np.array(x, np.int32) for x in ([0, 4], [1, 2, 3, 4], [-1, 0, -1, 2], [1, 2, 1, 2])), np.full(4, 0.5, np.float32))
    grants = Grants.of([0], [1], LAYERS)
    facts = facts_of(grants, draft, np.array([9], np.int32), np.array([0, 1], np.int32), np.array([2], np.int32), 0.0, 1.0)
    model, positions = Acceptance(), Positions()
    model.observe(facts)
    positions.observe(facts)
    assert model.tried.sum() == 3.0 and model.hits.sum() == 1.0
    assert positions.tried[:2].tolist() == [1.0, 1.0] and positions.hits[:2].tolist() == [1.0, 0.0]


def batch_of(caps: list[int], **kw: Any) -> Batch:
    n = len(caps)
    return Batch(np.full(n, 99, np.int32), np.ones(n, np.int32), np.ones(n, bool), np.array(caps, np.int32), np.zeros(n, bool), **kw)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_scan_finds_the_best_closed_set(seed: int) -> None:
    """Against all prefix-closed subsets of small forests, under a random machine with steps."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, 3)
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    parent, path = [], []
    for n in counts.tolist():
        mine: list[float] = []
        for j in range(n):
            up = int(rng.integers(-1, j))
            parent.append(up)
            mine.append(float(np.float32((1.0 if up < 0 else mine[up]) * rng.uniform(0.2, 1.0))))
        path += mine
    table = np.cumsum(rng.choice([0.0, 0.2, 1.0], 40)) + 2.0
    machine = Known(lambda f: table[f[:, 0].astype(int)])
    caps = [4, 4, 2]
    choice = best_nodes(batch_of(caps), offset, np.array(path, np.float32), machine)
    owner = np.repeat(np.arange(3), counts)

    def rate(keep: np.ndarray) -> float:
        return float((3 + np.array(path)[keep].sum()) / table[3 + int(keep.sum())])

    best = 0.0
    for bits in itertools.product([False, True], repeat=len(path)):
        keep = np.array(bits, bool)
        if (np.bincount(owner[keep], minlength=3) <= caps).all() and all(
            parent[i] < 0 or keep[offset[owner[i]] + parent[i]] for i in np.flatnonzero(keep)
        ):
            best = max(best, rate(keep))
    assert (np.bincount(owner[choice.keep], minlength=3) <= caps).all()
    # Probabilities closer than 0.8 % count as equal, and a cap can bind in the middle of the order.
    assert rate(choice.keep) >= 0.985 * best
    assert choice.tokens == pytest.approx(3 + np.array(path)[choice.keep].sum(), rel=1e-5)


def test_scan_prices_a_step_as_the_engine_does() -> None:
    """The features of the chosen prefix are those that ``mark`` gives the plan."""
    seen: list[np.ndarray] = []

    def machine(f: np.ndarray) -> np.ndarray:
        seen.append(f.copy())
        return np.ones(len(f))

    grants = Grants.of([0, 1, 2], [1, 1, 40], LAYERS, draft=[3, 2, 0])
    start, nodes = np.array([100, 50, 0], np.int32), np.array([3, 2, 0], np.int32)
    samples = np.array([True, True, False])
    batch = Batch(start, grants.tokens, samples, grants.draft, np.zeros(3, bool))
    best_nodes(batch, np.array([0, 3, 5, 5], np.int32), np.array([0.9, 0.8, 0.7, 0.9, 0.3], np.float32), Known(machine))
    f, zero = np.zeros(12), np.zeros(8, np.int32)
    mark(
        grants.slot, start, grants.tokens, nodes, grants.layer0, grants.layer1, LAYERS, samples.astype(np.uint8),
        zero.astype(np.uint8), zero.copy(), zero.copy(), f,
    )  # fmt: skip
    assert np.allclose(seen[0][5], f), (seen[0][5], f)
    assert seen[0][:, 0].tolist() == [42, 43, 44, 45, 46, 47, 42, 2]
    assert np.allclose(features_of(grants.select(samples), nodes[:2], start[:2])[[0, 4, 5, 6, 7]], [7, 5, 7, 157, 4 * 104 + 3 * 53])


def test_prompt_chunks_do_not_buy_drafts() -> None:
    """A chunk makes the step long, so a draft row looks cheap beside it; but it costs what it costs."""
    machine = Known(stairs(base=1e-3, tile=1, per_tile=1e-3, free_rows=0))
    path = np.full(8, 0.5, np.float32)
    offset = np.array([0, 4, 8, 8], np.int32)
    for chunk in (1, 400):
        batch = Batch(
            np.array([99, 99, 0], np.int32), np.array([1, 1, chunk], np.int32), np.array([True, True, False]), np.array([4, 4, 0], np.int32),
            np.zeros(3, bool),
        )  # fmt: skip
        assert best_nodes(batch, offset, path, machine).keep.sum() == 0


def test_latency_targets_come_first() -> None:
    """Request 0 may take 3 ms per token and a step takes 4: it needs a third of a token more, whatever the others lose."""
    machine = Known(stairs(base=4e-3, tile=1, per_tile=2e-4, free_rows=4))
    offset = np.array([0, 2, 6, 10, 14], np.int32)
    path = np.concatenate([[0.5, 0.3], np.tile([0.9, 0.8, 0.7, 0.6], 3)]).astype(np.float32)
    free = best_nodes(batch_of([4] * 4), offset, path, machine)
    each = np.array([3e-3, np.inf, np.inf, np.inf])
    bound = best_nodes(batch_of([4] * 4, each=each), offset, path, machine)

    def per_token(c: Any) -> float:
        return float(c.seconds / (1 + path[:2][c.keep[:2]].sum()))

    assert per_token(free) > 3e-3 >= per_token(bound) * (1 - 1e-6)
    assert bound.tokens < free.tokens
    hopeless = best_nodes(batch_of([4] * 4, each=np.array([1e-4, np.inf, np.inf, np.inf])), offset, path, machine)
    assert per_token(hopeless) <= per_token(bound) + 1e-9


def test_level_curve_counts_nodes_and_tokens() -> None:
    offset, depth = chain_depths(np.array([2, 0, 3], np.int32))
    assert offset.tolist() == [0, 2, 2, 5] and depth.tolist() == [1, 2, 1, 2, 3]
    rows: list[np.ndarray] = []

    def machine(f: np.ndarray) -> np.ndarray:
        rows.append(f[:, 0].copy())
        return np.ones(len(f))

    tokens, _ = level_curve(batch_of([2, 0, 3]), offset, depth, offset, np.array([0.5, 0.25, 0.8, 0.4, 0.2]), Known(machine))
    assert rows[0].tolist() == [3, 5, 7, 8] and np.allclose(tokens, [3, 4.3, 4.95, 5.15])
