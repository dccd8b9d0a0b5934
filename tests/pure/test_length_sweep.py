"""Load sweep 1..64 on a machine whose time has steps: ``marginal`` against every fixed length, on the same texts."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from presage.core.plan import Draft
from presage.draft.length import make_length
from tests.pure.lengths import Known, World, stairs

LOADS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
WARM = 250
FIXED = (0, 1, 2, 3, 4, 6, 12)
MACHINE = stairs()


def rate(policy: Any, batch: int, warm: int = 0, seconds: Any = MACHINE, **kw: Any) -> float:
    """Tokens per second on texts that are the same for all policies."""
    return World(policy, batch, seconds, **kw).run(max(1500, 50 * batch), warm)


@cache
def fixed(k: int) -> np.ndarray:
    # Small batches are measured over the very same requests; in large ones hundreds of requests average out.
    return np.array([rate(make_length("fixed", num_speculative_tokens=k), b, WARM * b if b <= 8 else 20 * b) for b in LOADS])


@cache
def best_fixed() -> np.ndarray:
    return np.asarray(np.max([fixed(k) for k in FIXED], 0))


def swept(name: str) -> np.ndarray:
    """Warm-up of two hundred steps at least: step time and acceptance are learnt from nothing."""
    return np.array([rate(make_length(name), b, WARM * b) for b in LOADS])


def test_marginal_is_as_good_as_the_best_fixed_length_at_every_load() -> None:
    """Within 2 %, learning as it goes, and no single fixed length comes near it over the whole range."""
    mine = swept("marginal")
    assert (mine >= 0.98 * best_fixed()).all(), np.round(mine / best_fixed(), 3)
    across = [float(np.exp(np.mean(np.log(mine / fixed(k))))) for k in FIXED]
    assert min(across) >= 1.15, dict(zip(FIXED, across))


def test_goodput_follows_the_load() -> None:
    theirs = swept("goodput")
    assert (theirs >= 0.9 * best_fixed()).all(), np.round(theirs / best_fixed(), 3)
    assert min(float(np.exp(np.mean(np.log(theirs / fixed(k))))) for k in FIXED) >= 1.1


def test_scanning_all_prefixes_beats_stopping_at_the_first_decrease() -> None:
    """A step of 32 rows: one more row is a loss, thirty-two more are a gain. Climbing stays where it is."""
    machine = stairs(base=4e-3, tile=32, per_tile=2e-3, free_rows=32)
    policy: Any = make_length("marginal", latency=Known(machine))
    world = World(policy, 32, machine, alphas=(0.9,), noise=0.0)
    for _ in range(150):
        world.step()
    nodes = [len(world.step().plan.draft) for _ in range(20)]
    f = np.zeros((3, 12))
    f[:, 0], f[:, 6] = [32, 33, 64], 32 * 400
    t = machine(f)
    assert 33 / t[1] < 32 / t[0], "the first row must look like a loss"
    assert min(nodes) >= 31


@pytest.mark.parametrize("name", ["goodput", "marginal"])
def test_dear_drafting_is_charged(name: str) -> None:
    """A model drafter that takes a millisecond per level: long drafts no longer pay, and the policy finds that out."""
    kw: dict[str, Any] = {"alphas": (0.6,), "drafting": 2e-4, "level": 1e-3}
    best = max(rate(make_length("fixed", num_speculative_tokens=k), 4, 400, **kw) for k in (0, 1, 2, 3, 4, 6))
    assert rate(make_length("fixed", num_speculative_tokens=12), 4, 400, **kw) < 0.75 * best
    assert rate(make_length(name), 4, 1200, **kw) >= 0.9 * best


def test_load_may_change_while_running() -> None:
    """The same policy object goes from one request to sixty-four and back."""
    policy = make_length("marginal")
    for batch, k in ((1, 12), (64, 0), (1, 12)):
        mine = rate(policy, batch, 150 * batch)
        assert mine >= 0.95 * rate(make_length("fixed", num_speculative_tokens=k), batch, 150 * batch)


def test_calibration_learns_what_claims_are_worth() -> None:
    """The drafter claims the square root of the truth; the policy's estimates are right within a few percent."""
    policy: Any = make_length("marginal", latency=Known(stairs(free_rows=4096)))
    world = World(policy, 8, stairs(free_rows=4096), seed=5)
    for _ in range(300):
        world.step()
    expected = got = 0.0
    for _ in range(200):
        facts = world.step()
        expected += float(policy.acceptance.path(facts.plan.slot, facts.plan.draft).sum())
        got += len(facts.done.path)
        claimed = float(facts.plan.draft.prob.sum())
    assert abs(expected / got - 1.0) < 0.06
    assert claimed > 0 and isinstance(facts.plan.draft, Draft)
