"""Acceptance rules are exact: by enumeration of every coin and draw on tiny vocabularies, and by chi-square on long seeded runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.draft.prune import keep_nodes
from presage.execute.sampling import Noise, Rows, Sampler
from presage.verify.bild import Bild, confidence
from presage.verify.block import Block
from presage.verify.keyed import Keyed
from presage.verify.kit import draft_of, plan_of, random_target, random_trees, target_rows
from presage.verify.rejection import Rejection
from presage.verify.typical import Typical
from presage.verify.without_replacement import WithoutReplacement, taken_out
from tests.pure.branches import Branches, Trials, World, all_drafts, distance

V = 3
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_k": 2},
    {"top_p": 0.75, "repetition_penalty": 1.6},
    {"presence_penalty": 1.0, "logit_bias": {1: 0.7}, "min_p": 0.1},
    {"temperature": 0.0},
]


def world(seed: int, **params: Any) -> World:
    return World(V, [1, 2], random_target(V, seed, 1.2), **params)


def proposal(seed: int, path: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, 7, *path]).dirichlet(np.ones(V))


def chain(seed: int, depth: int, points: tuple[int, ...] = ()):
    """A chain of ``depth``: each id drawn from its own q, or at the depths ``points`` a point mass."""

    def make(b: Branches, t: Trials) -> None:
        path, node = (), -1
        for d in range(depth):
            q = proposal(seed, path)
            token = int(np.argmax(q)) if d in points else b.pick(q.tolist())
            node = t.add(token, node, -1 if d in points else t.row(q))
            path = (*path, token)

    return make


def tree(seed: int, widths: tuple[int, ...], replace: bool):
    """A tree with ``widths[d]`` children per node at depth d, drawn with or without replacement; the last child of the root a point mass."""

    def grow(b: Branches, t: Trials, path: tuple[int, ...], node: int) -> None:
        if len(path) == len(widths):
            return
        q = proposal(seed, path)
        row, tried = t.row(q), []
        for _ in range(widths[len(path)]):
            token = b.pick((q if replace else taken_out(q, tried)).tolist())
            tried.append(token)
            grow(b, t, (*path, token), t.add(token, node, row))

    def make(b: Branches, t: Trials) -> None:
        grow(b, t, (), -1)
        t.add(seed % V, -1, -1)

    return make


CASES = {
    "rejection chain": (Rejection(), lambda s: chain(s, 3)),
    "rejection tree": (Rejection(), lambda s: tree(s, (2, 1), True)),
    "without_replacement tree": (WithoutReplacement(), lambda s: tree(s, (2, 2), False)),
    "without_replacement all": (WithoutReplacement(), lambda s: tree(s, (3,), False)),
    "block chain": (Block(), lambda s: chain(s, 3)),
    "block points": (Block(), lambda s: chain(s, 3, (0, 2))),
    "block tree": (Block(), lambda s: tree(s, (2, 1), True)),
}


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("case", CASES)
def test_exact_by_enumeration(case: str, kind: int) -> None:
    rule, make = CASES[case]
    assert rule.lossless and not rule.seed_stable
    w = world(kind + 11, **KINDS[kind])
    drafts = all_drafts(make(kind))
    length = 1 + max(int(d.depth.max()) for _, d in drafts)
    assert sum(p for p, _ in drafts) == pytest.approx(1.0, abs=1e-12)
    assert distance(w.law(rule, drafts, length), w.target_law(length)) < 1e-12


def test_negative_controls_are_caught() -> None:
    """Chosen tokens judged by ratios, siblings without replacement judged as if with, and sampled drafts dropped for what they are."""
    w = world(3)
    q = np.array([0.6, 0.3, 0.1])
    chosen = Trials()
    for token in (0, 1):
        chosen.add(token, -1, chosen.row(q))
    assert distance(w.law(Rejection(), [(1.0, chosen.draft())], 2), w.target_law(2)) > 0.01
    # Where the target exceeds q in one place only the wrong q does no harm, hence several.
    assert max(distance(w.law(Rejection(), all_drafts(tree(s, (2,), False)), 1), w.target_law(1)) for s in range(6)) > 0.01
    dropped = [(p, keep_nodes(d, d.token != 0, np.ones(1, bool))) for p, d in all_drafts(chain(1, 1))]
    assert distance(w.law(Rejection(), dropped, 1), w.target_law(1)) > 0.01


@pytest.mark.parametrize("case", ["rejection chain", "rejection tree", "without_replacement tree", "without_replacement all", "block chain"])
def test_drafts_pruned_by_a_grammar_stay_exact(case: str) -> None:
    """What a mask rules out is dropped from the draft for what it is, like a grammar does: ids 0 everywhere, 1 after a 2."""
    rule, make = CASES[case]
    for seed in range(3):
        w = world(seed + 40, bad_words_ids=[[0], [2, 1]])
        drafts, dropped = [], 0
        for weight, draft in all_drafts(make(seed)):
            after_2 = np.array([p >= 0 and draft.token[p] == 2 for p in draft.parent])
            legal = (draft.token != 0) & ~((draft.token == 1) & after_2)
            drafts.append((weight, keep_nodes(draft, legal, np.ones(1, bool))))
            dropped += len(draft) - len(drafts[-1][1])
        assert dropped > 0
        assert distance(w.law(rule, drafts, 4), w.target_law(4)) < 1e-12


def test_order_of_acceptance() -> None:
    """At equal draft cost: block >= token-wise; without replacement >= with replacement."""
    gains = []
    for seed in range(12):
        w = world(seed)
        chains = all_drafts(chain(seed, 3))
        gains.append(w.accepted(Block(), chains) - w.accepted(Rejection(), chains))
    assert min(gains) > -1e-12 and max(gains) > 0.01
    gains = []
    for seed in range(12):
        w = world(seed, temperature=0.5)
        gains.append(
            w.accepted(WithoutReplacement(), all_drafts(tree(seed, (2,), False))) - w.accepted(Rejection(), all_drafts(tree(seed, (2,), True)))
        )
    assert min(gains) > -1e-12 and max(gains) > 0.01


def test_taken_out_falls_back_to_what_was_not_tried() -> None:
    np.testing.assert_allclose(taken_out(np.array([0.5, 0.25, 0.25]), [0]), [0, 0.5, 0.5])
    np.testing.assert_allclose(taken_out(np.array([1.0, 0.0, 0.0]), [0]), [0, 0.5, 0.5])
    assert taken_out(np.array([0.5, 0.5, 0.0]), [0, 1, 2]).sum() == 0
    # A proposal with one id still gives exact trees of three siblings.
    w = world(5)

    def make(b: Branches, t: Trials) -> None:
        q, tried = np.array([0.0, 1.0, 0.0]), []
        row = t.row(q)
        for _ in range(3):
            tried.append(b.pick(taken_out(q, tried).tolist()))
            t.add(tried[-1], -1, row)

    assert distance(w.law(WithoutReplacement(), all_drafts(make), 2), w.target_law(2)) < 1e-12


# ---- long seeded runs with the real noise

N = 4000


def p_value(statistic: float, freedom: int) -> float:
    """Upper tail of chi-square, Wilson and Hilferty's approximation (1931)."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def judged(rule: Any, make: Any, w: World, **params: Any) -> list[tuple[int, ...]]:
    """Ids of one round for N requests with seeds 0.. N-1; the drafters' draws come from an independent generator."""
    rng, drafts = np.random.default_rng(99), []
    pool = all_drafts(make)
    odds = np.array([p for p, _ in pool])
    sampler = Sampler(V, [0])
    for s in range(N):
        sampler.open(s, Request(id=str(s), prompt=np.array(w.prompt, np.int32), sampling=SamplingParams(seed=s, max_tokens=50, **params)))
        drafts.append(pool[rng.choice(len(pool), p=odds / odds.sum())][1])
    flat = draft_of([list(zip(d.token.tolist(), d.parent.tolist(), strict=True)) for d in drafts])
    flat.trial_node = np.concatenate([d.trial_node + at for d, at in zip(drafts, flat.offset, strict=False)]).astype(np.int32)
    base = np.cumsum([0] + [len(d.q) for d in drafts])
    flat.trial_q = np.concatenate([np.where(d.trial_q < 0, -1, d.trial_q + at) for d, at in zip(drafts, base, strict=False)]).astype(np.int32)
    flat.q = np.concatenate([d.q for d in drafts])
    plan = plan_of(list(range(N)), [len(w.prompt)] * N, flat)
    logits, span, node = target_rows(plan, [w.prompt] * N, [w.target] * N)
    rows = Rows(logits, plan, (span, node), sampler, sampler.steps, None)
    verdict = rule.judge(rows, flat, Noise(sampler.seed[plan.slot], rows.base))
    return [tuple(verdict.ids[a:b].tolist()) for a, b in zip(verdict.off[:-1].tolist(), verdict.off[1:].tolist(), strict=True)]


@pytest.mark.parametrize("case", ["rejection tree", "without_replacement tree", "block chain"])
def test_long_runs_follow_the_target(case: str) -> None:
    rule, make = CASES[case]
    params = {"temperature": 0.8}
    w = world(21, **params)
    rng, counts, law = np.random.default_rng(5), dict[tuple[int, ...], int](), w.target_law(2)
    for ids in judged(rule, make(4), w, **params):
        # A round that ended after one id is continued by the target itself.
        pair = ids[:2] if len(ids) > 1 else (*ids, int(rng.choice(V, p=w.next_probs(ids))))
        counts[pair] = counts.get(pair, 0) + 1
    statistic = sum((counts.get(s, 0) - N * p) ** 2 / (N * p) for s, p in law.items())
    assert p_value(statistic, len(law) - 1) > 1e-4
    # Negative control: the same counts are not those of a target that is a little off.
    wrong = World(V, w.prompt, w.target, temperature=0.65).target_law(2)
    assert p_value(sum((counts.get(s, 0) - N * p) ** 2 / (N * p) for s, p in wrong.items()), len(wrong) - 1) < 1e-4


# ---- lossy rules

PARAMS: list[dict[str, Any]] = [{"seed": 3}, {"temperature": 0.0}, {"top_k": 3, "repetition_penalty": 1.3, "seed": 8}]


def step(rule: Any, trees: list[list[tuple[int, int]]], prob: np.ndarray | None = None, seed: int = 0) -> Any:
    sampler, vocab = Sampler(6, [0]), 6
    for s in range(len(trees)):
        params = SamplingParams(max_tokens=50, **PARAMS[s % len(PARAMS)])
        sampler.open(s, Request(id=str(s), prompt=np.array([1, 2], np.int32), sampling=params))
    draft = draft_of(trees)
    if prob is not None:
        draft.prob = prob.astype(np.float32)
    plan = plan_of(list(range(len(trees))), [2] * len(trees), draft)
    logits, span, node = target_rows(plan, [[1, 2]] * len(trees), [random_target(vocab, seed + s) for s in range(len(trees))])
    rows = Rows(logits, plan, (span, node), sampler, sampler.steps, None)
    return rule.judge(rows, draft, Noise(sampler.seed[plan.slot], rows.base)), rows, draft


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("path_off", "path", "off", "ids"))


@pytest.mark.parametrize("rule", [Bild(fallback_threshold=1.0), Typical(1.0, math.inf)])
def test_identity_points_are_keyed(rule: Any) -> None:
    assert rule.lossless and rule.seed_stable
    for seed in range(30):
        draw = random_trees(6, 9, seed)
        trees = [draw([]) for _ in range(6)]
        assert same(step(rule, trees, seed=seed)[0], step(Keyed(), trees, seed=seed)[0])


def test_lossy_rules_differ_when_opened() -> None:
    for rule in (Bild(0.0, 50.0), Typical(1e-6, 1e-6)):
        assert not rule.lossless and not rule.seed_stable
        kept, _, _ = step(rule, [[(5, -1), (4, 0), (3, 1)]])
        assert kept.path.tolist() == [0, 1, 2] and kept.ids[:3].tolist() == [5, 4, 3] and len(kept.ids) == 4


def test_typical_keeps_what_the_formula_says() -> None:
    """Chains of one: kept iff p(x) > min(eps, delta exp(-H)); greedy requests keep the argmax only."""
    rule, kept = Typical(), 0
    for seed in range(40):
        for token in range(6):
            verdict, rows, _ = step(rule, [[(token, -1)], [(token, -1)]], seed=seed)
            p = rows.probs(np.array([0, 1], np.int32), np.array([-1, -1], np.int32))
            floor = min(0.09, 0.3 * math.exp(sum(x * math.log(x) for x in p[0] if x > 0)))
            drawn, _, _ = step(Keyed(), [[(token, -1)], [(token, -1)]], seed=seed)
            accepted = np.diff(verdict.path_off)
            assert accepted[0] == (p[0][token] > floor or np.diff(drawn.path_off)[0])
            assert accepted[1] == (token == np.argmax(p[1]))
            kept += int(accepted[0])
    assert 40 < kept < 240


def test_the_longest_kept_branch_wins_then_the_likelier() -> None:
    # Everything is kept: depth decides between 0-1 and 2-3-4, likelihood between siblings 5 and 6.
    verdict, rows, _ = step(Bild(0.0, 1e9), [[(1, -1), (2, 0), (3, -1), (1, 2), (4, 3), (5, 3)]])
    p = rows.probs(np.array([0], np.int32), np.array([3], np.int32))[0]
    assert verdict.path.tolist()[:3] == [2, 3, 4 if p[4] >= p[5] else 5]


def test_bild_falls_back_and_rolls_back() -> None:
    trees = [[(5, -1), (4, 0), (3, 1)]]
    _, rows, _ = step(Bild(), trees)
    nll = [-math.log(rows.probs(np.array([0], np.int32), np.array([i - 1], np.int32))[0][t]) for i, (t, _) in enumerate(trees[0])]
    sure = np.array([0.9, 0.81, 0.729])
    drawn = np.diff(step(Keyed(), trees)[0].path_off)[0]
    assert drawn == 0  # so what is kept below is kept by the rule
    limit = max(nll[0], nll[1]) + 1e-6
    kept, _, _ = step(Bild(0.6, limit), trees, sure)
    assert kept.path.tolist()[:2] == [0, 1] and (len(kept.path) == 3) == (nll[2] <= limit)
    # Rollback at the first token; its place is taken by the large model's own choice.
    rolled, _, _ = step(Bild(0.6, nll[0] - 1e-6), trees, sure)
    assert rolled.path.tolist() == [] and rolled.ids.tolist() == step(Keyed(), trees)[0].ids.tolist()
    # The small model was not sure of its second token: the large one decides there.
    unsure, _, draft = step(Bild(0.6, 1e9), trees, np.array([0.9, 0.45, 0.44]))
    np.testing.assert_allclose(confidence(draft), [0.9, 0.5, 0.44 / 0.45], rtol=1e-6)
    assert unsure.path.tolist()[:1] == [0] and (len(unsure.path) == 1 or unsure.ids[1] == 4)


def test_rules_drop_spans_that_cannot_be_decided() -> None:
    for rule in (Rejection(), WithoutReplacement(), Block(), Typical(), Bild(0.0)):
        sampler = Sampler(4, [0])
        for s in range(2):
            sampler.open(s, Request(id=str(s), prompt=np.array([1], np.int32), sampling=SamplingParams(max_tokens=9)))
        draft = draft_of([[(1, -1)], [(2, -1)]])
        plan = plan_of([0, 1], [1, 1], draft)
        logits = np.zeros((4, 4), np.float32)
        logits[0] = np.nan
        rows = Rows(logits, plan, (np.array([0, 0, 1, 1], np.int32), np.array([-1, 0, -1, 0], np.int32)), sampler, sampler.steps, None)
        verdict = rule.judge(rows, draft, Noise(sampler.seed[plan.slot], rows.base))
        assert set(rows.failed) == {0} and verdict.off.tolist()[:2] == [0, 0] and verdict.off[2] > 0
