"""Acceptance rules that compare drafts with the probabilities they were drawn with: a draft model must export these, and draw from them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from presage import LLM, SamplingParams
from presage.draft.grow import Trees
from presage.execute.propose import Ask, Proposed
from tests.tiny.speculation_work import GREEDY, answers, engine, expected, idle

MODEL = {"method": "draft_model", "model": "presage-tiny-draft", "num_speculative_tokens": 4}
CASES: dict[str, dict[str, Any]] = {
    "chain": MODEL,
    "tree": {"method": "model", "model": "presage-tiny-draft", "num_speculative_tokens": 7, "tree_width": 3, "tree_depth": 3},
    "merged": {"method": "hybrid", "drafters": [{"method": "suffix"}, MODEL, {"method": "early_exit"}], "num_speculative_tokens": 4},
}
FREE = [one for one in GREEDY if one[1].structured_outputs is None]
RULES = [("chain", "block"), ("tree", "rejection"), ("tree", "without_replacement"), ("merged", "rejection")]


def drafting(spec: dict[str, Any], rule: str) -> LLM:
    return engine({**spec, "length": {"policy": "fixed", "num_speculative_tokens": 6}, "rule": rule})


@functools.cache
def exact() -> dict[tuple[int, ...], float]:
    """Probabilities of all answers of five tokens with top_k 2, from log-probabilities of the engine without drafts."""
    llm, found = engine(None), {(): 1.0}
    ids = llm.tokenizer.encode("import")
    for _ in range(5):
        one = SamplingParams(temperature=0, max_tokens=1, logprobs=2, ignore_eos=True)
        outs = llm.generate([{"prompt_token_ids": [*ids, *path]} for path in found], one)
        longer = {}
        for (path, p), out in zip(found.items(), outs, strict=True):
            top = sorted(out.outputs[0].logprobs[0].items(), key=lambda kv: kv[1].rank)[:2]
            weights = np.exp([lp.logprob for _, lp in top])
            longer |= {(*path, t): p * float(w) for (t, _), w in zip(top, weights / weights.sum(), strict=True)}
        found = longer
    llm.close()
    return found


@pytest.mark.parametrize(("case", "rule"), RULES, ids=lambda v: v)
def test_rules_that_use_the_drafts_probabilities_are_exact_in_distribution(case: str, rule: str) -> None:
    llm, n = drafting(CASES[case], rule), 300
    ids = llm.tokenizer.encode("import")
    many = [SamplingParams(temperature=1.0, top_k=2, max_tokens=5, ignore_eos=True, seed=7919 * i) for i in range(n)]
    got = [tuple(o.outputs[0].token_ids) for o in llm.generate([{"prompt_token_ids": ids}] * n, many)]
    stats = llm.stats()
    idle(llm)
    llm.close()
    assert stats["spec_num_draft_tokens"] > stats["spec_num_accepted_tokens"] > n / 3
    law = exact()
    assert set(got) <= set(law)
    often = [path for path, p in law.items() if n * p >= 5]
    seen, want = (np.array([f(p) for p in often], float) for f in (got.count, lambda p: n * law[p]))
    seen, want = np.append(seen, n - seen.sum()), np.append(want, n - want.sum())
    chi = float((((seen - want) ** 2) / np.maximum(want, 1e-9))[want >= 5].sum())
    freedom = int((want >= 5).sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal; 4 sigma is one false alarm in 30,000 runs.
    assert ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5 < 4.0


def test_greedy_answers_stand_under_every_rule() -> None:
    for case, rule in RULES:
        llm = drafting(CASES[case], rule)
        assert answers(llm, FREE) == [w for w, one in zip(expected(False)[0], GREEDY) if one in FREE], (case, rule)
        idle(llm)
        llm.close()


@pytest.mark.parametrize("draws", ["", "with", "without"])
def test_trees_are_well_formed(draws: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        width, grants = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        budget, limit = rng.integers(0, 9, grants).astype(np.int32), rng.integers(0, 5, grants).astype(np.int32)
        trees = Trees(budget, limit, Ask(width, draws), min_prob=float(rng.choice([0.0, 0.1])))
        alive = rng.random(grants) < 0.9
        while len(rows := trees.front):
            q = rng.dirichlet([0.3] * 6, len(rows)).astype(np.float32)
            ids = np.array([rng.permutation(6)[:width] if draws != "with" else rng.integers(0, 6, width) for _ in rows], np.int32)
            prob = np.sort(rng.random((len(rows), width)), 1)[:, ::-1].astype(np.float32) / width
            trees.grow(Proposed(ids, np.repeat(q.max(1)[:, None], width, 1) if draws else prob, q if draws else None), alive)
            assert (trees.computed <= budget).all()
        draft = trees.draft("model")
        counts = np.diff(draft.offset)
        assert (counts <= budget).all() and (draft.depth <= np.repeat(limit, counts)).all()
        for a, b in zip(draft.offset[:-1], draft.offset[1:]):
            parent, token, prob = draft.parent[a:b], draft.token[a:b], draft.prob[a:b]
            assert (parent < np.arange(b - a)).all()
            assert len(set(zip(parent.tolist(), token.tolist()))) == b - a
            assert (prob[parent >= 0] <= prob[parent[parent >= 0]] + 1e-7).all()
        if draws and len(draft):
            assert set(draft.trial_node.tolist()) == set(range(len(draft)))
            assert draft.trial_q.max() < len(draft.q)
