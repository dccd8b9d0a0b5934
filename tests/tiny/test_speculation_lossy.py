"""Lossy rules: at their identity point nothing changes; from there on every turn of the dial buys longer steps with the target's likelihood."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.tiny.speculation_work import CALLS, CLASS, GREEDY, LENGTHS, LINES, MODELS, SAMPLED, answers, engine, expected, params

PROMPTS = (CLASS, LINES, CALLS, "def mean(values):\n    return ", "SELECT name FROM users WHERE", "for i in range(10):\n")
DIALS = (
    "fallback_threshold=1",
    "fallback_threshold=0.6,rollback_threshold=2",
    "fallback_threshold=0,rollback_threshold=5",
    "fallback_threshold=0,rollback_threshold=50",
)


def spec(rule: str) -> dict[str, Any]:
    return {**MODELS["model chain"], "rule": rule, "length": LENGTHS["fixed"]}


@functools.cache
def greedy(rule: str) -> tuple[list[list[int]], float, float]:
    """Outputs, the target's mean negative log-likelihood of them, tokens per verified draft. ``rule`` "": no speculation."""
    llm = engine(spec(rule) if rule else None)
    results = [r.outputs[0] for r in llm.generate(list(PROMPTS), [params(max_tokens=48, logprobs=0)] * len(PROMPTS))]
    nll = float(np.mean([-lp.logprob for r in results for at in r.logprobs or [] for lp in at.values()]))
    stats = llm.stats()
    llm.close()
    return [r.token_ids for r in results], nll, 1 + stats["spec_num_accepted_tokens"] / max(1, stats["spec_num_drafts"])


@pytest.mark.parametrize("rule", ["bild:fallback_threshold=1", "typical:posterior_threshold=1,posterior_alpha=inf"])
def test_identity_points_give_the_target(rule: str) -> None:
    llm = engine(spec(rule))
    assert answers(llm, GREEDY + SAMPLED) == expected(True)[0]
    assert llm.stats()["spec_num_accepted_tokens"] > 20
    llm.close()


def test_bild_trades_quality_for_length() -> None:
    want, best, _ = greedy("")
    curve = [greedy(f"bild:{dial}") for dial in DIALS]
    same = [float(np.mean([np.mean(np.array(a) == b) for a, b in zip(ids, want, strict=True)])) for ids, _, _ in curve]
    assert same[0] == 1.0 and same == sorted(same, reverse=True) and same[-1] < 0.5
    assert curve[0][1] == pytest.approx(best, abs=1e-6) and curve[-1][1] > 1.3 * best
    gained = [length for _, _, length in curve]
    assert gained == sorted(gained) and gained[-1] > 1.3 * gained[0]


def test_typical_keeps_more_of_a_sampled_draft() -> None:
    def kept(rule: str) -> float:
        llm = engine(spec(rule))
        llm.generate(list(PROMPTS) * 2, [params(temperature=1.0, max_tokens=32, seed=i) for i in range(2 * len(PROMPTS))])
        stats = llm.stats()
        llm.close()
        return float(stats["spec_num_accepted_tokens"] / stats["spec_num_draft_tokens"])

    strict, usual, loose = kept("typical:posterior_threshold=1,posterior_alpha=inf"), kept("typical"), kept("typical:posterior_threshold=0.001")
    assert strict < usual < loose
