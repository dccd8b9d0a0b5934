"""Acceptance rules: keyed ids do not depend on drafts, rejection is exact, both follow the target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage import verify
from presage.core.errors import ConfigError, StepFailed
from presage.core.plan import Draft
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.execute.sampling import Sampler
from presage.verify.kit import draft_of, generate, plan_of, random_target, random_trees, target_rows
from presage.verify.rejection import accept_probability, residual

V = 6

KINDS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 3, "seed": 5},
    {"top_p": 0.8, "repetition_penalty": 1.5},
    {"min_tokens": 12, "presence_penalty": 1.0, "frequency_penalty": 0.5, "stop_token_ids": [3]},
    {"bad_words_ids": [[1, 2], [2, 1, 0], [4]], "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logit_bias": {2: 1.5}},
]


def opened(seed: int, kinds: list[dict] = KINDS) -> tuple[Sampler, dict, dict]:
    sampler, prompts, targets = Sampler(V, [0], engine_seed=seed), {}, {}
    for i, kw in enumerate(kinds):
        prompts[i] = np.random.default_rng([seed, i]).integers(0, V, 3 + i).tolist()
        targets[i] = random_target(V, seed * 100 + i)
        params = SamplingParams(max_tokens=100, **kw)
        sampler.open(i, Request(id=f"{seed}-{i}", prompt=np.array(prompts[i], np.int32), sampling=params))
    return sampler, prompts, targets


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), nodes=st.integers(1, 14))
def test_keyed_ids_are_those_of_a_run_without_drafts(seed, nodes):
    plain = generate(*opened(seed), 20)
    drafted = generate(*opened(seed), 20, random_trees(V, nodes, seed))
    assert drafted == plain


def test_drafts_are_really_accepted():
    sampler, prompts, targets = opened(1)
    truth = generate(*opened(1), 20)
    draft = draft_of([[(t, i - 1) for i, t in enumerate(truth[s][:4])] for s in range(len(KINDS))])
    plan = plan_of(list(range(len(KINDS))), [len(prompts[s]) for s in prompts], draft)
    judged = sampler.judge(*_args(target_rows(plan, [prompts[s] for s in prompts], [targets[s] for s in targets]), plan))
    assert np.diff(judged.path_off).tolist() == [4] * len(KINDS)
    assert np.diff(judged.new_off).tolist() == [5] * len(KINDS)
    assert judged.new[:5].tolist() == truth[0][:5]


def _args(made, plan):
    logits, span, node = made
    return logits, plan, span, node


def test_tree_path_names_nodes_of_the_span():
    sampler = Sampler(V)
    greedy = SamplingParams(temperature=0.0)
    for slot in (0, 1):
        sampler.open(slot, Request(id=str(slot), prompt=np.array([1, 2], np.int32), sampling=greedy))
    # Span 1: nodes 0 = 5, 1 = 3, 2 = 5 after 3, 3 = 4 after 3, 4 = 1 after 4; the target says 3, 4, 1, 2.
    plan = plan_of([0, 1], [2, 2], draft_of([[(0, -1)], [(5, -1), (3, -1), (5, 1), (4, 1), (1, 3)]]))
    best = [2, 0, 3, 0, 4, 0, 1, 2]
    x = np.eye(V, dtype=np.float32)[best]
    span, node = np.array([0, 0, 1, 1, 1, 1, 1, 1], np.int32), np.array([-1, 0, -1, 0, 1, 2, 3, 4], np.int32)
    for shuffle in (np.arange(8), np.array([5, 0, 7, 2, 1, 6, 3, 4])):
        judged = sampler.judge(x[shuffle], plan, span[shuffle], node[shuffle])
        assert judged.new_off.tolist() == [0, 1, 5] and judged.new.tolist() == [2, 3, 4, 1, 2]
        assert judged.path_off.tolist() == [0, 0, 3] and judged.path.tolist() == [1, 3, 4]


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    n = counts.sum()
    return float((((counts - n * p) ** 2) / np.maximum(n * p, 1e-12))[p > 0].sum())


def draws(rule: str, x: np.ndarray, n: int, draft_for=None, **kw) -> np.ndarray:
    """First ids of n requests with seeds 0..n-1 that share one row, and rows of equal logits after every draft node."""
    sampler = Sampler(len(x))
    for s in range(n):
        sampler.open(s, Request(id=str(s), prompt=np.array([0], np.int32), sampling=SamplingParams(seed=s, **kw)))
    draft = draft_for(n) if draft_for else Draft.none(n)
    plan = plan_of(list(range(n)), [1] * n, draft, rule)
    count = np.diff(draft.offset) + 1
    span = np.repeat(np.arange(n), count).astype(np.int32)
    node = np.concatenate([np.arange(-1, c - 1) for c in count]).astype(np.int32)
    judged = sampler.judge(np.tile(x, (len(span), 1)), plan, span, node)
    return judged.new[judged.new_off[:-1]]


@pytest.mark.parametrize("kw", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}])
def test_keyed_draws_follow_the_target(kw):
    x = np.random.default_rng(7).standard_normal(10).astype(np.float32)
    z = x.astype(np.float64) / kw.get("temperature", 1.0)
    ranked = np.argsort(-z)
    p = np.exp(z) / np.exp(z).sum()
    if "top_k" in kw:
        p[ranked[4:]] = 0
    if "top_p" in kw:
        p[ranked[np.cumsum(p[ranked]) - p[ranked] >= 0.7]] = 0
    p /= p.sum()
    counts = np.bincount(draws("keyed", x, 20000, **kw), minlength=10)
    assert (counts[p == 0] == 0).all()
    assert chi_square(counts, p) < 36.0  # 9 degrees of freedom: exceeded once in 25,000 seeds


def test_rejection_follows_the_target_with_model_drafts_and_trees():
    rng = np.random.default_rng(2)
    x = rng.standard_normal(V).astype(np.float32)
    p = np.exp(x.astype(np.float64))
    p /= p.sum()
    q = rng.dirichlet(np.ones(V))

    def drafted(n: int) -> Draft:
        # Two children drawn from q and one point mass; equal draws share a node but stay separate trials.
        trees, trial_node, trial_q, flat = [], [], [], 0
        for _ in range(n):
            tree: list[tuple[int, int]] = []
            for token, row in ((rng.choice(V, p=q), 0), (rng.choice(V, p=q), 0), (1, -1)):
                node = (int(token), -1)
                if node not in tree:
                    tree.append(node)
                trial_node.append(flat + tree.index(node))
                trial_q.append(row)
            trees.append(tree)
            flat += len(tree)
        draft = draft_of(trees)
        draft.trial_node, draft.trial_q, draft.q = np.array(trial_node, np.int32), np.array(trial_q, np.int32), q[None]
        return draft

    counts = np.bincount(draws("rejection", x, 6000, drafted), minlength=V)
    assert chi_square(counts, p) < 30.0  # 5 degrees of freedom


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), trials=st.lists(st.booleans(), min_size=1, max_size=3))
def test_rejection_is_exact_by_enumeration(seed, trials):
    """Sum over every draw of the proposals and every outcome of the coins."""
    rng = np.random.default_rng(seed)
    v = 4
    p = rng.dirichlet(np.full(v, 0.5))
    p[p < 0.05] = 0
    p /= p.sum()
    qs = [rng.dirichlet(np.ones(v)) if sampled else None for sampled in trials]
    fixed = rng.integers(0, v, len(trials))
    out = np.zeros(v)
    for draw in itertools.product(*[range(v) if q is not None else [int(fixed[i])] for i, q in enumerate(qs)]):
        weight = np.prod([q[x] for q, x in zip(qs, draw, strict=True) if q is not None])
        left, reach = p, weight
        for q, x in zip(qs, draw, strict=True):
            keep = accept_probability(left, x, q)
            out[x] += reach * keep
            reach *= 1 - keep
            if reach <= 0:
                break
            left = residual(left, x, q)
        out += reach * left
    np.testing.assert_allclose(out, p, atol=1e-12)


def test_softmax_ratios_for_argmax_drafts_would_be_caught():
    """Negative control: judging a chosen token as if it had been drawn from q is biased, and the enumeration sees it."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])
    x = int(np.argmax(q))
    keep = accept_probability(p, x, q)
    out = keep * np.eye(3)[x] + (1 - keep) * residual(p, x, q)
    assert abs(out - p).max() > 0.1


def test_rejection_without_drafts_and_at_temperature_zero_equals_keyed():
    x = np.random.default_rng(0).standard_normal(V).astype(np.float32)
    np.testing.assert_array_equal(draws("rejection", x, 50), draws("keyed", x, 50))
    chain = lambda n: draft_of([[(int(np.argmax(x)), -1), (0, 0)]] * n)  # noqa: E731
    assert set(draws("rejection", x, 20, chain, temperature=0.0).tolist()) == {int(np.argmax(x))}


def test_registry_and_the_greedy_rule():
    assert {"keyed", "greedy", "rejection"} <= set(verify.names())
    assert [verify.get(n).lossless for n in ("keyed", "greedy", "rejection")] == [True, True, True]
    assert verify.get("keyed").seed_stable and not verify.get("rejection").seed_stable
    with pytest.raises(ConfigError, match="keyed"):
        verify.get("no_such_rule")
    x = np.random.default_rng(1).standard_normal(V).astype(np.float32)
    chain = lambda n: draft_of([[(int(np.argmax(x)), -1)]] * n)  # noqa: E731
    np.testing.assert_array_equal(draws("greedy", x, 5, chain, temperature=0.0), draws("keyed", x, 5, chain, temperature=0.0))
    with pytest.raises(StepFailed) as failed:
        draws("greedy", x, 3, temperature=1.0)
    assert failed.value.details["slots"] == [0, 1, 2]
