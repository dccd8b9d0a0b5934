"""Pruning and exactness: under rejection-type rules a sampled draft is judged or not for reasons fixed before it was drawn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from presage.core.plan import Draft, Grants
from presage.core.request import Request
from presage.draft.length import make_length
from presage.draft.length.wishes import binding
from tests.pure.lengths import LAYERS, Known, view_of

P, Q = np.array([0.5, 0.5]), np.array([0.9, 0.1])


def dear(f: np.ndarray) -> np.ndarray:
    """A row more costs half a step: only likely drafts pay."""
    return 0.5 + 0.5 * f[:, 0]


def policy_for(accept: list[str], name: str = "marginal", ask: int = 4) -> tuple[Any, Any, Grants]:
    """A policy that was told each request's rule, its view, and grants of ``ask`` nodes."""
    n = len(accept)
    policy: Any = make_length(name, latency=Known(dear), **({} if name == "marginal" else {"explore_every": 1 << 30}))
    for slot, rule in enumerate(accept):
        policy.wishes.open(slot, Request(id=str(slot), prompt=np.arange(3), accept=rule))
    view = view_of(n)
    view.step = 7
    return policy, view, Grants.of(np.arange(n), np.ones(n, np.int32), LAYERS, draft=[ask] * n)


def sampled(tokens: list[int], point: bool = False) -> Draft:
    """One span: a chain of draws from ``Q`` whose claims are their own probabilities, as a drafter that forgets the contract has them."""
    draft = Draft.chains([tokens])
    draft.prob = np.cumprod(Q[tokens]).astype(np.float32)
    draft.trial_node = np.arange(len(tokens), dtype=np.int32)
    draft.trial_q = np.full(len(tokens), -1 if point else 0, np.int32)
    return draft


def after_rejection(kept: bool, x: int) -> np.ndarray:
    """Distribution of the next token once ``x`` was drawn from ``Q``, if its node was judged or not."""
    if not kept:
        return P
    accept = min(1.0, P[x] / Q[x])
    residual = np.maximum(P - Q, 0) / np.maximum(P - Q, 0).sum()
    return np.asarray(accept * np.eye(2)[x] + (1 - accept) * residual)


def outcome(rule: str) -> np.ndarray:
    total = np.zeros(2)
    for x in range(2):
        policy, view, grants = policy_for([rule], ask=1)
        keep = policy.select(view, grants, sampled([x])).node
        total += Q[x] * after_rejection(bool(keep[0]), x)
    return total


def test_rejection_stays_exact_by_enumeration() -> None:
    assert np.allclose(outcome("rejection"), P, atol=1e-12)


def test_the_trap_is_real() -> None:
    """The same pruning, had the policy not known the rule: the likely token is kept, the other dropped, and .5 becomes .55."""
    assert np.allclose(outcome("keyed"), [0.55, 0.45], atol=1e-12)


@pytest.mark.parametrize("name", ["marginal", "goodput"])
def test_nothing_of_a_sampled_span_depends_on_what_was_drawn(name: str) -> None:
    masks = set()
    for tokens in itertools.product(range(2), repeat=4):
        policy, view, grants = policy_for(["rejection"], name)
        masks.add(tuple(policy.select(view, grants, sampled(list(tokens))).node.tolist()))
    assert masks == {(True,) * 4}


def test_point_masses_may_be_dropped_under_any_rule() -> None:
    policy, view, grants = policy_for(["rejection"])
    keep = policy.select(view, grants, sampled([0, 1, 1, 1], point=True)).node
    assert keep.tolist() == [True, False, False, False]


def test_bound_and_free_requests_share_a_batch() -> None:
    """The bound span is kept whole; its neighbour is pruned by what its nodes are worth."""
    policy, view, grants = policy_for(["rejection", "keyed"])
    one = sampled([0, 1, 1, 1])
    draft = Draft(
        np.array([0, 4, 8], np.int32), np.tile(one.token, 2), np.tile(one.parent, 2), np.tile(one.depth, 2), np.tile(one.prob, 2),
        trial_node=np.arange(8, dtype=np.int32), trial_q=np.zeros(8, np.int32),
    )  # fmt: skip
    keep = policy.select(view, grants, draft).node
    assert keep[:4].all() and not keep[5:].any()


def test_bound_requests_are_asked_for_what_they_will_verify() -> None:
    """What may not be cut afterwards is planned before: far less than the drafter could give."""
    policy, view, _ = policy_for(["rejection", "keyed"])
    ask = policy.ask(view, np.full(view.table.capacity, 16, np.int32))
    assert ask[0] < 16 and ask[1] == 16


def test_which_rules_bind() -> None:
    """Exact over the draws only: rejection. Seed-stable rules never; a rule nobody knows, to be safe. The engine's rule binds all."""
    assert binding("rejection") and binding("somebody-elses") and not binding("keyed") and not binding("greedy")
    policy: Any = make_length("marginal", rule="rejection")
    policy.wishes.open(0, Request(id="0", prompt=np.arange(3)))
    assert policy.wishes.bound.all()
