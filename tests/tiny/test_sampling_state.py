"""The sampler's memory: seeds, histories, forks, migration; log-probabilities; faults that stay with their slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from presage.core.errors import RequestError, StepFailed
from presage.core.plan import NewIds
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.execute.sampling import Sampler
from presage.execute.sampling.logprobs import token_logprobs
from presage.verify.kit import draft_of, generate, plan_of, random_target

V = 32
WATCHED = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "bad_words_ids": [[1, 2]]}


def request(name: str = "a", prompt=(1, 2, 3), emitted=(), branch: int = 0, **kw) -> Request:
    return Request(
        id=name,
        prompt=np.array(prompt, np.int32),
        emitted=np.array(emitted, np.int32),
        branch=branch,
        sampling=SamplingParams(max_tokens=100, **kw),
    )


def run(sampler: Sampler, slots: dict[int, list[int]], tokens: int = 16) -> dict[int, list[int]]:
    return generate(sampler, slots, dict.fromkeys(slots, random_target(V, 4)), tokens)


def step(slot: int, ids: list[int]) -> NewIds:
    return NewIds(np.array([slot], np.int32), np.array([0, len(ids)], np.int32), np.array(ids, np.int32), np.zeros(1, np.uint8))


def view(sampler: Sampler, slot: int) -> dict[int, tuple[int, bool]]:
    counts = sampler.lists(slot).counts
    ids, output, prompt = counts.view()
    return {t: (n, bool(p)) for t, n, p in zip(ids.tolist(), output.tolist(), prompt.tolist(), strict=True) if n or p}


def test_a_seed_gives_the_same_ids_whatever_the_slot_engine_or_neighbours():
    one, two = Sampler(V, engine_seed=1), Sampler(V, engine_seed=2)
    one.open(0, request("x", seed=77))
    for slot, name in enumerate("abc"):
        two.open(slot, request(name))
    two.open(900, request("y", seed=77))
    alone = run(one, {0: [1, 2, 3]})[0]
    crowd = run(two, {0: [1, 2, 3], 1: [1, 2, 3], 900: [1, 2, 3], 2: [1, 2, 3]})
    assert crowd[900] == alone
    assert len({tuple(ids) for ids in crowd.values()}) == 4


def test_unseeded_requests_are_reproducible_by_id_and_engine_seed():
    ids = []
    for engine_seed in (3, 3, 4):
        sampler = Sampler(V, engine_seed=engine_seed)
        sampler.open(5, request("same"))
        ids.append(run(sampler, {5: [1, 2, 3]})[5])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("seed", [None, 12])
def test_branches_differ_and_are_reproducible(seed):
    runs = []
    for _ in range(2):
        sampler = Sampler(V)
        sampler.open(0, request("p", seed=seed, **WATCHED))
        for branch in (1, 2):
            sampler.fork(0, branch, request("p", seed=seed, branch=branch, **WATCHED))
        runs.append(run(sampler, {0: [1, 2, 3], 1: [1, 2, 3], 2: [1, 2, 3]}))
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0].values()}) == 3


def test_history_follows_advance_rewind_fork_save_and_resume():
    sampler = Sampler(V)
    sampler.open(3, request(**WATCHED))
    sampler.advance(step(3, [5, 5, 1]))
    sampler.advance(step(3, [9]))
    expected = {1: (1, True), 2: (0, True), 3: (0, True), 5: (2, False), 9: (1, False)}
    assert view(sampler, 3) == expected and sampler.length(3) == 7
    sampler.fork(3, 70, request("b", branch=1, **WATCHED))
    resumed = Sampler(V, engine_seed=8)
    resumed.open(0, request(emitted=[5, 5, 1, 9], **WATCHED))
    moved = Sampler(V, engine_seed=8)
    moved.open(1, request(**WATCHED))
    moved.load(1, sampler.save(3))
    assert view(sampler, 70) == view(resumed, 0) == view(moved, 1) == expected
    assert moved.seed[1] == sampler.seed[3] != resumed.seed[0] and moved.length(1) == 7
    sampler.rewind(3, 5)
    assert view(sampler, 3) == {1: (0, True), 2: (0, True), 3: (0, True), 5: (2, False)} and sampler.length(3) == 5
    assert view(sampler, 70) == expected
    sampler.rewind(3, 2)
    assert view(sampler, 3) == {1: (0, True), 2: (0, True)} and sampler.length(3) == 2


def test_default_slots_keep_no_history():
    sampler = Sampler(V)
    sampler.open(0, request())
    sampler.advance(step(0, [4, 4]))
    assert sampler.wants[0] == 0 and sampler.lists(0).out is None and sampler.length(0) == 5


def test_a_reused_slot_forgets_its_last_request():
    sampler = Sampler(V)
    sampler.open(0, request(temperature=0.3, top_k=2, logprobs=3, min_tokens=4, seed=1, **WATCHED))
    sampler.close(0)
    sampler.open(0, request("fresh"))
    plain = Sampler(V)
    plain.open(0, request("fresh"))
    assert run(sampler, {0: [1, 2, 3]}) == run(plain, {0: [1, 2, 3]})
    assert sampler.logprobs[0] == -1


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids", "bad_words"])
def test_ids_outside_the_vocabulary_are_refused(field):
    value = {"logit_bias": {V: 1.0}, "allowed_token_ids": [V], "stop_token_ids": [V], "bad_words": [[1, V]]}[field]
    name = "bad_words_ids" if field == "bad_words" else field
    with pytest.raises(RequestError) as refused:
        Sampler(V).open(0, request(**{name: value}))
    assert refused.value.param == field


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_bad_logits_fail_their_own_slot_only(bad):
    sampler = Sampler(V)
    kinds = [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"seed": 1}]
    for slot, kw in enumerate(kinds):
        sampler.open(slot, request(str(slot), **kw))
    x = np.random.default_rng(0).standard_normal((5, V)).astype(np.float32)
    plan, span, node = plan_of([0, 1, 2, 3, 4], [3] * 5), np.arange(5, dtype=np.int32), np.full(5, -1, np.int32)
    good = sampler.judge(x, plan, span, node).new
    for broken in ([0], [1, 2], [3]):
        y = x.copy()
        y[broken, 17] = bad
        with pytest.raises(StepFailed, match="NaN") as failed:
            sampler.judge(y, plan, span, node)
        assert failed.value.details["slots"] == broken
        judged = failed.value.details["judged"]
        kept = [s for s in range(5) if s not in broken]
        assert np.diff(judged.new_off).tolist() == [int(s in kept) for s in range(5)]
        np.testing.assert_array_equal(judged.new, good[kept])


def test_an_empty_support_is_named():
    sampler = Sampler(V)
    sampler.open(0, request(allowed_token_ids=[4], bad_words_ids=[[4]]))
    sampler.open(1, request("b"))
    x = np.zeros((2, V), np.float32)
    with pytest.raises(StepFailed, match=r"slot 0: .*no token") as failed:
        sampler.judge(x, plan_of([0, 1], [3, 3]), np.array([0, 1], np.int32), np.full(2, -1, np.int32))
    assert failed.value.details["slots"] == [0] and len(failed.value.details["judged"].new) == 1


def test_spans_that_do_not_sample_decide_nothing():
    sampler = Sampler(V)
    for slot in range(3):
        sampler.open(slot, request(str(slot), temperature=0.0))
    x = np.eye(V, dtype=np.float32)[[7]]
    judged = sampler.judge(torch.from_numpy(x), plan_of([0, 1, 2], [3, 3, 3]), np.array([1], np.int32), np.array([-1], np.int32))
    assert judged.new_off.tolist() == [0, 0, 1, 1] and judged.new.tolist() == [7]


def test_logprobs_are_of_the_raw_logits_at_the_row_that_decided():
    sampler = Sampler(V)
    sampler.open(0, request(temperature=0.0, logprobs=3, logit_bias={2: 50.0}))
    sampler.open(1, request("b", logprobs=0))
    sampler.open(2, request("c"))
    x = torch.randn(5, V, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 4] = x[0, 9] = 20.0  # a tie: the lower id ranks first
    plan = plan_of([0, 1, 2], [3, 3, 3], draft_of([[(2, -1), (2, 0)], [], []]))
    judged = sampler.judge(x, plan, np.array([0, 0, 0, 1, 2], np.int32), np.array([-1, 0, 1, -1, -1], np.int32))
    assert sorted(judged.logprobs) == [0, 1] and judged.new[:3].tolist() == [2, 2, 2]
    lp = torch.log_softmax(x.double(), -1)
    for r, entry in enumerate(judged.logprobs[0]):
        assert entry.id == 2 and entry.logprob == pytest.approx(float(lp[r, 2]), abs=1e-5)
        assert entry.rank == int((x[r] > x[r, 2]).sum()) + 1 and len(entry.top_ids) == 3
        assert entry.top_logprobs == pytest.approx(lp[r, entry.top_ids].tolist(), abs=1e-5)
    assert judged.logprobs[0][0].top_ids[:2] == [4, 9]
    assert judged.logprobs[1][0].top_ids == [] and judged.logprobs[1][0].id == judged.new[3]


def test_prompt_logprobs_name_the_next_prompt_ids():
    sampler = Sampler(V)
    prompt = np.arange(10, dtype=np.int32)
    sampler.open(0, request(prompt=prompt, prompt_logprobs=2))
    plan = plan_of([0], [10])
    plan.start, plan.count = np.array([4], np.int32), np.array([6], np.int32)
    x = torch.randn(5, V, generator=torch.Generator().manual_seed(1))
    entries = sampler.prompt_logprobs(x, plan, 0, row=1)
    assert [e.id for e in entries] == [6, 7, 8, 9]  # rows of tokens 5..8; the row of token 9 predicts the output
    lp = torch.log_softmax(x.double(), -1)
    for r, e in enumerate(entries):
        assert e.logprob == pytest.approx(float(lp[r, e.id]), abs=1e-5)
        assert e.top_ids == torch.topk(x[r], 2).indices.tolist()


@pytest.mark.parametrize("v", [5, 64, 1000])
def test_token_logprobs_match_torch_and_rank_ties_by_id(v):
    x = torch.randn(6, v, generator=torch.Generator().manual_seed(v)) * 4
    x[3:] = x[3:].round()
    x[5, 1:] = -float("inf")
    ids = np.array([0, v - 1, 2, 3, 1, 0], np.int32)
    k = min(7, v)
    lp = torch.log_softmax(x.double(), -1)
    for r, e in enumerate(token_logprobs(x.numpy(), ids, k)):
        ranked = np.lexsort((np.arange(v), -x[r].numpy()))
        ranked = ranked[np.isfinite(x[r].numpy()[ranked])]
        assert e.top_ids == ranked[:k].tolist()
        assert e.rank == int(np.flatnonzero(ranked == ids[r])[0]) + 1
        assert e.logprob == pytest.approx(float(lp[r, ids[r]]), abs=1e-5)
        assert e.top_logprobs == pytest.approx(lp[r, e.top_ids].tolist(), abs=1e-5)


def test_a_fork_whose_prompt_holds_the_source_output_counts_it_as_prompt():
    sampler = Sampler(V)
    sampler.open(0, request(**WATCHED))
    sampler.advance(step(0, [7, 8]))
    sampler.fork(0, 1, request("child", prompt=(1, 2, 3, 7, 8), **WATCHED))
    assert view(sampler, 1) == dict.fromkeys((1, 2, 3, 7, 8), (0, True))
    assert sampler.length(1) == sampler.length(0) == 5
