"""Sampling under rejection-type rules: which token a seed gives may depend on what was drafted, the distribution may not."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import pytest

from presage.core.sampling_params import SamplingParams, StructuredOutputsParams
from tests.tiny.speculation_work import CALLS, LENGTHS, LINES, LOOK_UPS, MODELS, engine, params

N = 400
KINDS: list[tuple[str, dict[str, Any]]] = [
    (LINES, {"temperature": 1.1, "top_k": 3, "presence_penalty": 0.3, "max_tokens": 4}),
    (CALLS, {"temperature": 1.3, "structured_outputs": StructuredOutputsParams(regex="[a-c]{1,3}"), "ignore_eos": False}),
]
CASES = [
    ("model tree", "rejection"),
    ("model tree", "without_replacement"),
    ("model chain", "block"),
    ("early_exit chain", "rejection"),
    ("ngram", "block"),
]
Counts = list[Counter[tuple[int, ...]]]


def counts(spec: dict[str, Any] | None, first_seed: int = 0, **other: Any) -> tuple[Counts, dict[str, Any]]:
    """How often each output came, by kind of request, and the engine's statistics."""
    llm = engine(spec, max_num_seqs=64, max_num_batched_tokens=2048, max_waiting=len(KINDS) * N)
    prompts, wishes = list[str](), list[SamplingParams]()
    for prompt, kind in KINDS:
        prompts += [prompt] * N
        wishes += [params(**{**kind, **other}, seed=first_seed + i) for i in range(N)]
    out = [tuple(r.outputs[0].token_ids) for r in llm.generate(prompts, wishes)]
    stats = llm.stats()
    llm.close()
    return [Counter(out[k * N : (k + 1) * N]) for k in range(len(KINDS))], stats


@functools.cache
def plain(**other: Any) -> Counts:
    """Without speculation. Other seeds: equal ones would make the two samples depend on each other."""
    return counts(None, 10_000, **other)[0]


def alike(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
    """p value of two samples of equal size having one distribution: chi-square, rare outputs together, Wilson and Hilferty's approximation."""
    rare = [s for s in a | b if a[s] + b[s] < 10]
    cells = [(a[s], b[s]) for s in a | b if a[s] + b[s] >= 10] + [(sum(a[s] for s in rare), sum(b[s] for s in rare))]
    cells = [c for c in cells if sum(c)]
    statistic, freedom = sum((x - y) ** 2 / (x + y) for x, y in cells), len(cells) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_the_distribution_is_that_of_a_run_without_drafts(name: str, rule: str) -> None:
    got, stats = counts({**LOOK_UPS, **MODELS}[name] | {"rule": rule, "length": LENGTHS["fixed"]})
    assert not stats["faults"] and stats["spec_num_accepted_tokens"] > N / 5
    assert stats["spec_num_draft_tokens"] - stats["spec_num_accepted_tokens"] > N / 5
    for one, other, warmer in zip(got, plain(), plain(temperature=3.0), strict=True):
        assert len(one) > 10
        assert alike(one, other) > 1e-3
        assert alike(one, warmer) < 1e-3  # the test sees a difference where there is one
