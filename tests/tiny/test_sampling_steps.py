"""Every step against a naive per-row computation, and the rule that rows never depend on their neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.execute.sampling import Noise, Rows, Sampler
from presage.execute.sampling.noise import draw_rows, gumbel, stream_keys
from presage.execute.sampling.select import min_p_rows, top_k_rows, top_p_rows
from presage.verify.kit import draft_of, plan_of

V = 200
FAST = settings(max_examples=60, deadline=None)


def rows_of(seed: int, n: int, v: int, ties: bool, holes: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, v)) * rng.choice([0.1, 1.0, 5.0])).astype(np.float32)
    if ties:
        x = np.round(x)
    if holes:
        x[rng.random((n, v)) < 0.7] = -np.inf
        x[:, int(rng.integers(v))] = 0.0
    return x


def order(row: np.ndarray) -> np.ndarray:
    return np.lexsort((np.arange(len(row)), -row))


shapes = given(seed=st.integers(0, 10**6), v=st.integers(1, 700), ties=st.booleans(), holes=st.booleans(), data=st.data())


@FAST
@shapes
def test_top_k_keeps_the_k_first_in_order(seed, v, ties, holes, data):
    x, k = rows_of(seed, 3, v, ties, holes), data.draw(st.integers(1, v))
    z = x.copy()
    top_k_rows(z, np.array([0, 2]), np.array([k, 1]))
    for r, kept in ((0, k), (1, v), (2, 1)):
        expected = np.full(v, -np.inf, np.float32)
        expected[order(x[r])[:kept]] = x[r][order(x[r])[:kept]]
        np.testing.assert_array_equal(z[r], expected)


@FAST
@shapes
def test_top_p_keeps_the_smallest_sufficient_set(seed, v, ties, holes, data):
    x, p = rows_of(seed, 2, v, ties, holes), data.draw(st.floats(0.01, 0.999))
    z = x.copy()
    top_p_rows(z, np.array([1]), np.array([p]))
    np.testing.assert_array_equal(z[0], x[0])
    weights = np.exp(x[1].astype(np.float64) - x[1].max())
    ranked = order(x[1])
    before = np.cumsum(weights[ranked]) - weights[ranked]
    kept = np.isfinite(z[1][ranked])
    # The kept set is a prefix of the order; at its border float32 weights may differ from exact ones by a hair.
    assert kept[0] and not (kept[1:] & ~kept[:-1]).any()
    slack = 2e-6 * weights.sum()
    assert (before[kept] < p * weights.sum() + slack).all()
    assert (before[~kept & np.isfinite(x[1][ranked])] >= p * weights.sum() - slack).all()


@FAST
@shapes
def test_min_p_compares_with_the_likeliest(seed, v, ties, holes, data):
    x, p = rows_of(seed, 1, v, ties, holes), data.draw(st.floats(0.001, 1.0))
    z = x.copy()
    min_p_rows(z, np.array([0]), np.array([np.log(p)], np.float32))
    floor = x[0].max() + np.float32(np.log(p))
    np.testing.assert_array_equal(z[0], np.where(x[0] >= floor, x[0], -np.inf))


@np.errstate(invalid="ignore")  # restrictions may leave an empty row: -inf minus -inf
def naive(x: np.ndarray, p: SamplingParams, prompt: list[int], out: list[int], eos: list[int], allowed: np.ndarray | None) -> np.ndarray:
    """The target logits of one row, step by step, as vLLM documents them."""
    z = x.astype(np.float64)
    if allowed is not None:
        z[~allowed] = -np.inf
    if p.allowed_token_ids:
        z[[t for t in range(len(z)) if t not in p.allowed_token_ids]] = -np.inf
    for word in p.bad_words_ids or []:
        if len(word) == 1 or (len(out) >= len(word) - 1 and out[len(out) - len(word) + 1 :] == word[:-1]):
            z[word[-1]] = -np.inf
    if len(out) < p.min_tokens and allowed is None:  # a grammar's mask already knows min_tokens
        z[[*eos, *(p.stop_token_ids or [])]] = -np.inf
    for t, b in (p.logit_bias or {}).items():
        z[t] += b
    for t in set(prompt) | set(out):
        z[t] = z[t] / p.repetition_penalty if z[t] > 0 else z[t] * p.repetition_penalty
    for t in set(out):
        z[t] -= p.frequency_penalty * out.count(t) + p.presence_penalty
    if p.greedy:
        return z
    z = z / p.temperature
    if p.min_p > 0:
        z[np.exp(z - z.max()) < p.min_p] = -np.inf
    if 0 < p.top_k < len(z):
        z[order(z)[p.top_k :]] = -np.inf
    if p.top_p < 1:
        e = np.exp(z - z.max())
        ranked = order(z)
        z[ranked[np.cumsum(e[ranked]) - e[ranked] >= p.top_p * e.sum()]] = -np.inf
    return z


ids = st.integers(0, V - 1)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 7, 150]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    min_tokens=st.integers(0, 6),
    max_tokens=st.just(50),
    stop_token_ids=st.lists(ids, max_size=2),
    logit_bias=st.none() | st.dictionaries(ids, st.sampled_from([-3.0, 4.0]), max_size=4),
    allowed_token_ids=st.none() | st.lists(ids, min_size=30, max_size=60),
    bad_words_ids=st.none() | st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=4),
)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), many=st.lists(params, min_size=1, max_size=4), masked=st.booleans())
def test_all_steps_match_the_naive_order_with_draft_ancestors(seed, many, masked):
    rng = np.random.default_rng(seed)
    eos, n = [0], len(many)
    sampler = Sampler(V, eos)
    # Ids 0..3 repeat, so that bad words and counts meet histories that hold them.
    prompts = [rng.integers(0, V, 5) for _ in many]
    said = [rng.integers(0, 4, int(rng.integers(0, 6))).astype(np.int32) for _ in many]
    for i, p in enumerate(many):
        sampler.open(i, Request(id=str(i), prompt=prompts[i].astype(np.int32), emitted=said[i], sampling=p))
    trees = [[(1, -1), (2, 0), (3, -1)] for _ in many]
    plan = plan_of(list(range(n)), [5 + len(s) for s in said], draft_of(trees))
    x = (rng.standard_normal((4 * n, V)) * 3).astype(np.float32)
    span, node = np.repeat(np.arange(n), 4).astype(np.int32), np.tile([-1, 0, 1, 2], n).astype(np.int32)
    allowed = rng.random((4 * n, 7 * 32)) < 0.6
    allowed[:, 1:40] = True
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    masks = (np.arange(0, 4 * n, 2), bits[::2]) if masked else None
    rows = Rows(x, plan, (span, node), sampler.state, sampler.steps, masks)
    z = rows.modified(span, node)
    for r in range(4 * n):
        path = [[], [1], [1, 2], [3]][r % 4]
        mask = allowed[r, :V] if masked and r % 2 == 0 else None
        want = naive(x[r], many[r // 4], prompts[r // 4].tolist(), said[r // 4].tolist() + path, eos, mask)
        differ = np.isfinite(want) != np.isfinite(z[r])
        assert differ.sum() <= (1 if many[r // 4].top_p < 1 else 0)  # one id at the border of the mass
        both = np.isfinite(want) & np.isfinite(z[r])
        np.testing.assert_allclose(z[r][both], want[both], rtol=2e-5, atol=2e-5)


def test_rows_are_the_same_alone_permuted_and_with_any_neighbours():
    rng = np.random.default_rng(3)
    kinds = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.6}, {"min_p": 0.1}, {"presence_penalty": 1.0}]
    sampler = Sampler(V, [1], engine_seed=9)
    for i in range(24):
        prompt = rng.integers(0, V, 4 + i).astype(np.int32)
        sampler.open(i, Request(id=f"r{i}", prompt=prompt, sampling=SamplingParams(**kinds[i % 6])))
    x = rng.standard_normal((24, V)).astype(np.float32)
    known = [4 + i for i in range(24)]

    def judge(slots: list[int]) -> list[int]:
        n = len(slots)
        plan = plan_of(slots, [known[s] for s in slots])
        return sampler.judge(x[slots], plan, np.arange(n, dtype=np.int32), np.full(n, -1, np.int32)).new.tolist()

    together = judge(list(range(24)))
    assert [judge([s])[0] for s in range(24)] == together
    shuffled = rng.permutation(24).tolist()
    assert judge(shuffled) == [together[s] for s in shuffled]


@pytest.mark.parametrize("v", [1, 63, 64, 65, 1000])
def test_the_draw_is_the_argmax_of_logit_plus_noise(v):
    rng = np.random.default_rng(v)
    x = (rng.standard_normal((40, v)) * np.linspace(0, 6, 40)[:, None]).astype(np.float32)
    x[:, 1:][rng.random((40, v - 1)) < 0.3] = -np.inf
    keys = stream_keys(np.arange(40, dtype=np.uint64), np.arange(40) * 7)
    scale, out = np.linspace(0.3, 3, 40).astype(np.float32), np.empty(40, np.int32)
    greedy = np.arange(40) % 5 == 0
    draw_rows(x, np.arange(40), greedy, scale, keys, out)
    every = np.arange(v, dtype=np.int32)
    for r in range(40):
        scores = x[r] if greedy[r] else x[r] * scale[r] + gumbel(int(keys[r]), every)
        assert out[r] == np.argmax(scores)


def test_noise_has_the_moments_of_a_gumbel_and_no_visible_correlation():
    keys = stream_keys(np.full(40, 11, np.uint64), np.arange(40))
    g = np.stack([gumbel(int(k), np.arange(20000, dtype=np.int32)) for k in keys]).astype(np.float64)
    n = g.size
    assert abs(g.mean() - 0.5772157) < 5 * 1.2825 / np.sqrt(n)
    assert abs(g.std() - 1.2825498) < 0.01
    neighbours = np.corrcoef(g[:-1].ravel(), g[1:].ravel())[0, 1], np.corrcoef(g[:, :-1].ravel(), g[:, 1:].ravel())[0, 1]
    assert max(map(abs, neighbours)) < 5 / np.sqrt(n)
    coins = np.array([Noise(np.array([5], np.uint64), np.array([k], np.int64)).uniform(0, 0) for k in range(2000)])
    assert abs(coins.mean() - 0.5) < 0.04 and coins.min() >= 0 and coins.max() < 1
