"""The executor end to end: real model, real sampler, plans by hand."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from presage.core.plan import NewIds, StepDone, StepFault, StepPlan
from presage.core.protocols import Companion
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.core.types import Want
from presage.execute.executor import TorchExecutor
from presage.execute.sampling.sampler import Sampler
from presage.models.base import Model
from tests.tiny.plans import Part, Planner
from tests.tiny.rig import geometry_of, tiny

VOCAB = 300
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    return tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


class Bench:
    """An executor with its queue of results, and the companions' side of the loop."""

    def __init__(self, model: Model, pooling: Any = "last") -> None:
        geometry = geometry_of(model, 64)
        self.executor = TorchExecutor(model, geometry, Sampler(VOCAB), pooling=pooling)
        self.planner = Planner(geometry, len(model.layers))
        self.events: queue.Queue[Any] = queue.Queue()
        self.executor.start(self.events.put)

    def open(self, slot: int, ids: list[int], sampling: SamplingParams = GREEDY) -> None:
        for companion in self.executor.companions():
            companion.open(slot, Request(id=f"r{slot}", prompt=np.array(ids, np.int32), sampling=sampling))

    def submit(self, parts: list[Part], **changes: Any) -> StepPlan:
        plan = self.planner.plan(parts)
        for name, value in changes.items():
            setattr(plan, name, value)
        self.executor.submit(plan)
        return plan

    def result(self) -> Any:
        return self.events.get(timeout=60)

    def step(self, parts: list[Part], **changes: Any) -> Any:
        plan = self.submit(parts, **changes)
        done = self.result()
        if isinstance(done, StepDone):
            for companion in self.executor.companions():
                companion.advance(NewIds(plan.slot, done.new_off, done.new, np.zeros(plan.spans, np.uint8)))
        return done


@pytest.fixture
def bench(pair: tuple[Any, Model]) -> Iterator[Bench]:
    made = Bench(pair[1])
    yield made
    made.executor.close()


def greedy(reference: Any, ids: list[int], n: int) -> list[int]:
    """The reference's own greedy continuation, without a cache."""
    out = list(ids)
    with torch.inference_mode():
        for _ in range(n):
            out.append(int(reference(torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


def test_greedy_continuations_equal_transformers(pair: tuple[Any, Model], bench: Bench) -> None:
    prompts = {0: prompt(1, 40), 3: prompt(2, 5), 7: prompt(3, 33)}
    for slot, ids in prompts.items():
        bench.open(slot, ids)
    known = {slot: list(ids) for slot, ids in prompts.items()}
    done = bench.step([Part(slot, 0, ids) for slot, ids in prompts.items()])
    for _ in range(8):
        for i, slot in enumerate(prompts):
            known[slot] += done.new[done.new_off[i] : done.new_off[i + 1]].tolist()
        done = bench.step([Part(slot, len(ids) - 1, ids[-1:]) for slot, ids in known.items()])
        assert done.t1 >= done.t0
    for slot, ids in prompts.items():
        assert known[slot][len(ids) :] == greedy(pair[0], ids, 8)


def test_minus_one_is_the_last_sampled_id(pair: tuple[Any, Model], bench: Bench) -> None:
    ids = prompt(1, 20)
    bench.open(130, ids)
    bench.submit([Part(130, 0, ids)])
    bench.submit([Part(130, 20, [-1])])
    bench.submit([Part(130, 21, [-1])])
    assert [int(bench.result().new[0]) for _ in range(3)] == greedy(pair[0], ids, 3)


def test_a_chunk_that_is_not_the_last_samples_nothing(pair: tuple[Any, Model], bench: Bench) -> None:
    ids, other = prompt(1, 40), prompt(2, 9)
    bench.open(0, ids)
    bench.open(1, other)
    done = bench.step([Part(0, 0, ids[:25], want=Want.NONE), Part(1, 0, other)])
    assert done.new_off.tolist() == [0, 0, 1] and done.new.tolist() == greedy(pair[0], other, 1)
    assert bench.step([Part(0, 25, ids[25:])]).new.tolist() == greedy(pair[0], ids, 1)


def test_a_correct_draft_is_accepted_and_a_wrong_one_is_not(pair: tuple[Any, Model], bench: Bench) -> None:
    ids = prompt(1, 30)
    bench.open(0, ids)
    a, b, c, d = greedy(pair[0], ids, 4)
    tree = [(a, -1), ((a + 1) % VOCAB, -1), (b, 0), ((c + 1) % VOCAB, 2), (c, 2)]
    done = bench.step([Part(0, 0, ids, tree)])
    assert done.new.tolist() == [a, b, c, d] and done.path.tolist() == [0, 2, 4]


def test_logits_masks_are_by_span_and_node(pair: tuple[Any, Model], bench: Bench) -> None:
    ids, other = prompt(1, 12), prompt(2, 12)
    bench.open(0, ids)
    bench.open(1, other)
    first = greedy(pair[0], other, 1)[0]
    only = np.zeros((2, -(-VOCAB // 32)), np.int32)
    only[0, first // 32] = np.uint32(1 << (first % 32)).view(np.int32)
    only[1, 5] = 1 << 7

    class Late:
        def masks(self) -> tuple[np.ndarray, np.ndarray]:
            return np.array([[1, -1], [1, 0]], np.int32), only

    done = bench.step([Part(0, 0, ids), Part(1, 0, other, [(first, -1)])], late=Late())
    assert done.new.tolist() == [*greedy(pair[0], ids, 1), first, 5 * 32 + 7]


def test_prompt_logprobs_equal_transformers(pair: tuple[Any, Model], bench: Bench) -> None:
    ids = prompt(4, 150)
    bench.open(2, ids, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2))
    both = Want.SAMPLE | Want.PROMPT_LOGPROBS
    entries = bench.step([Part(2, 0, ids[:100], want=Want.PROMPT_LOGPROBS)]).exports["prompt_logprobs"][0]
    entries += bench.step([Part(2, 100, ids[100:], want=both)]).exports["prompt_logprobs"][0]
    with torch.inference_mode():
        expected = torch.log_softmax(pair[0](torch.tensor([ids])).logits[0], -1)
    assert len(entries) == len(ids) - 1
    for i, entry in enumerate(entries):
        assert entry.id == ids[i + 1] and entry.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-3)
        assert entry.top_ids[0] == int(expected[i].argmax())


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_pooling_over_chunks_equals_transformers(pair: tuple[Any, Model], kind: Any) -> None:
    bench, ids = Bench(pair[1], kind), prompt(5, 50)
    bench.open(0, ids)
    bench.step([Part(0, 0, ids[:7], want=Want.POOL)])  # preempted: starts again
    for a, b in ((0, 20), (20, 21), (21, 50)):
        pooled = bench.step([Part(0, a, ids[a:b], want=Want.POOL)]).exports["pooled"][0]
    bench.executor.close()
    with torch.inference_mode():
        hidden = pair[0].model(torch.tensor([ids])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0) if kind == "mean" else hidden[-1], dim=0)
    assert np.abs(pooled - expected.numpy()).max() < 1e-5


def test_a_failing_step_names_its_slots_and_the_executor_goes_on(bench: Bench) -> None:
    ids = prompt(1, 10)
    bench.open(4, ids)
    fault = bench.step([Part(4, 0, [VOCAB + 5]), Part(9, 0, [3])])
    assert isinstance(fault, StepFault) and fault.slots.tolist() == [4, 9] and "vocabulary" in fault.error
    fault = bench.step([Part(4, 0, ids, layer0=1)])
    assert isinstance(fault, StepFault) and fault.slots.tolist() == [4] and "layer 1" in fault.error
    assert isinstance(bench.step([Part(4, 0, ids)]), StepDone)


def test_nan_logits_end_only_their_own_slot(bench: Bench) -> None:
    """A read of KV that nobody wrote must not take the neighbours down."""
    ids = prompt(1, 10)
    for slot in (0, 1):
        bench.open(slot, ids)
    for arrays in bench.executor.kv.groups:
        for keys, values in arrays:
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
    fault = bench.step([Part(0, 0, ids), Part(1, 4, ids[4:])])
    assert isinstance(fault, StepFault) and fault.slots.tolist() == [1] and "NaN" in fault.error


def test_a_plan_of_moves_alone_and_a_foreign_lane(bench: Bench) -> None:
    empty = bench.planner.plan([Part(0, 0, [3])])
    for name in ("slot", "start", "count", "nodes", "layer0", "layer1", "want", "ids", "position", "index"):
        setattr(empty, name, getattr(empty, name)[:0])
    empty.rows = empty.rows[:1]
    bench.executor.submit(empty)
    assert bench.result().new_off.tolist() == [0]
    assert "lane 2" in bench.step([Part(0, 0, [3])], lane=2).error


def test_a_closed_slot_leaves_nothing_in_the_bank(bench: Bench) -> None:
    ids = prompt(1, 10)
    bench.open(6, ids)
    bench.step([Part(6, 0, ids, layer1=1, want=Want.NONE)])
    assert bench.executor.run.bank.nbytes == 10 * 64 * 4
    companion: Companion = bench.executor.companions()[1]
    companion.close(6)
    assert bench.executor.run.bank.nbytes == 0
