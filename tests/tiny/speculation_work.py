"""What the tests of speculation send to an engine: one request of every kind, on prompts that repeat themselves so that look-ups find drafts."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from presage import LLM, SamplingParams
from presage.bundled import bundled_path
from presage.core.errors import PresageError
from presage.core.plan import Grants, StepPlan
from presage.core.request import Request
from presage.core.sampling_params import StructuredOutputsParams
from presage.engine.assemble import Assembler
from presage.engine.inputs import make_request, prompt_ids
from presage.engine.log import NullLog
from presage.engine.loop import Loop

CLASS = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n\n    def "
LINES = "import os\nimport sys\nimport os\nimport sys\nimport os\nimport"
CALLS = "print(a)\nprint(b)\nprint(a)\nprint(b)\nprint(a)\nprint(b)\n"
ITEM = '{"id": 1, "name": "item"}'
SCHEMA = {
    "type": "array",
    "minItems": 3,
    "maxItems": 3,
    "items": {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["item", "items"]}},
        "required": ["id", "name"],
        "additionalProperties": False,
    },
}


def params(**wishes: Any) -> SamplingParams:
    """Greedy and short unless ``wishes`` says otherwise."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **wishes})


GREEDY: list[tuple[str, SamplingParams]] = [
    (CLASS, params(max_tokens=64)),
    (LINES, params(logprobs=3)),
    (CALLS, params(n=2, max_tokens=24)),
    (LINES, params(stop=["sys\nimport os"], ignore_eos=False)),
    (CALLS, params(stop=["print(b"], min_tokens=12)),
    (CLASS, params(repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2)),
    (f"[{ITEM}, {ITEM}, {ITEM}]\n" * 2, params(structured_outputs=StructuredOutputsParams(json=SCHEMA), max_tokens=60, logprobs=0)),
    (CALLS, params(structured_outputs=StructuredOutputsParams(regex=r"(print\([ab]\)\n){6}"), min_tokens=36)),
]
SAMPLED: list[tuple[str, SamplingParams]] = [
    (CLASS, params(temperature=0.8, top_p=0.9, seed=7, logprobs=1)),
    (LINES, params(temperature=0.6, top_k=20, seed=3, n=2, repetition_penalty=1.1)),
    (CALLS, params(temperature=0.7, min_p=0.05, seed=11, structured_outputs=StructuredOutputsParams(regex=r"(print\([ab]\)\n){4,9}"))),
]


LOOK_UPS: dict[str, dict[str, Any]] = {
    "suffix chain": {"method": "suffix"},
    "suffix tree": {"method": "suffix", "suffix_decoding_tree": True, "suffix_decoding_max_spec_factor": 4.0},
    "ngram": {"method": "ngram", "prompt_lookup_min": 1},
    "lookahead tree": {"method": "lookahead", "branch_length": 6},
    "lookahead chain": {"method": "lookahead", "tree": False, "branch_length": 6},
    "merged": {"method": "hybrid", "drafters": [{"method": "suffix", "suffix_decoding_tree": True}, {"method": "ngram", "prompt_lookup_min": 1}]},
    "threshold": {"method": "hybrid", "combine": "threshold", "tau": 1.5, "drafters": [{"method": "suffix"}, {"method": "ngram"}]},
}
DRAFT_MODEL = str(bundled_path("presage-tiny-draft"))
MODELS: dict[str, dict[str, Any]] = {
    "model chain": {"method": "model", "model": DRAFT_MODEL, "num_speculative_tokens": 4},
    "model tree": {"method": "model", "model": DRAFT_MODEL, "num_speculative_tokens": 6, "tree_width": 2, "tree_depth": 3},
    "early_exit chain": {"method": "early_exit", "exit_layer": 4},
    "early_exit tree": {"method": "early_exit", "exit_layer": 3, "num_speculative_tokens": 6, "tree_width": 2, "tree_depth": 3},
    "suffix over model": {"method": "hybrid", "combine": "threshold", "tau": 1.5, "drafters": ["suffix", {"method": "model", "model": DRAFT_MODEL}]},
}
RULES = ("keyed", "greedy", "rejection", "without_replacement", "block")
LENGTHS: dict[str, Any] = {
    "fixed": {"policy": "fixed", "num_speculative_tokens": 6},
    "marginal": "marginal",
    "goodput": {"policy": "goodput", "explore_every": 5},
}
LOADS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked": {"max_num_batched_tokens": 23, "max_draft_tokens": 40},
    "tight": {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 64},
}
Run = tuple[str, str, str, str]


def runs(drafters: dict[str, dict[str, Any]]) -> list[Run]:
    """(drafter, rule, length, load): every pair of any two occurs. Each run holds every kind of request."""
    out = [(d, r, list(LENGTHS)[(i + j) % 3], list(LOADS)[(i + 2 * j) % 3]) for i, d in enumerate(drafters) for j, r in enumerate(RULES)]
    for a, b in itertools.combinations(range(4), 2):
        choices = [drafters, RULES, LENGTHS, LOADS]
        assert {(run[a], run[b]) for run in out} == set(itertools.product(choices[a], choices[b]))
    return out


class Nodes(NullLog):
    """Keeps the draft nodes of every step by request id. A log is told of each launched step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def decided(self, loop: Loop, plan: StepPlan, grants: Grants) -> None:
        """A step was launched."""
        by: dict[str, int] = {}
        for slot, nodes in zip(plan.slot.tolist(), plan.nodes.tolist()):
            name = loop.requests[slot].id
            by[name] = by.get(name, 0) + nodes
        self.steps.append(by)

    def most(self, request_id: str) -> int:
        """Most nodes of a request in one step."""
        return max(step.get(request_id, 0) for step in self.steps)


def engine(spec: dict[str, Any] | None, **settings: Any) -> LLM:
    """The bundled model on one thread."""
    if "num_gpu_blocks_override" not in settings:
        settings.setdefault("kv_cache_memory", "32MiB")
    return LLM("presage-tiny", **{"threads": 1, "max_num_seqs": 16, "max_model_len": 512, "speculative_config": spec, **settings})


def answers(llm: LLM, work: list[tuple[str, SamplingParams]]) -> list[list[Any]]:
    """Per request, per branch: ids, text, how it ended, and log-probabilities as (id, rank, top ids)."""
    out = []
    for r in llm.generate([p for p, _ in work], [s for _, s in work]):
        out.append([(o.token_ids, o.text, o.finish_reason, o.stop_reason, _chosen(o.logprobs)) for o in r.outputs])
    return out


def _chosen(logprobs: Any) -> Any:
    return None if logprobs is None else [{i: lp.rank for i, lp in sorted(at.items())} for at in logprobs]


def values(llm: LLM, work: list[tuple[str, SamplingParams]]) -> np.ndarray:
    """All log-probabilities of the requests that want them, flat, in order."""
    work = [(p, s) for p, s in work if s.logprobs is not None]
    results = llm.generate([p for p, _ in work], [s for _, s in work])
    return np.array([lp.logprob for r in results for o in r.outputs for at in o.logprobs or [] for _, lp in sorted(at.items())])


def send(llm: LLM, prompt: str, sampling: SamplingParams, name: str, **fields: Any) -> Request:
    """A request as a front would make it, with fields that ``LLM.generate`` has no word for."""
    request = make_request(prompt_ids(prompt, llm.tokenizer)[0], sampling, llm.tokenizer, name, **fields)
    return llm._add(request)


def collect(llm: LLM, requests: list[Request]) -> dict[str, Any]:
    """Drive the engine until all have ended: the ids of each, or the error that it got."""
    by_id, out = {r.id: Assembler(r, llm.tokenizer, None) for r in requests}, dict[str, Any]()
    while len(out) < len(by_id):
        llm.engine.driver.step()
        for e in llm._inbox:
            try:
                by_id[e.id].add(e)
                if by_id[e.id].done:
                    out[e.id] = by_id[e.id].output.outputs[0].token_ids
            except PresageError as error:
                out[e.id] = error
        llm._inbox.clear()
    return out


@functools.cache
def expected(sampled: bool) -> tuple[list[Any], np.ndarray]:
    """Answers and log-probabilities without speculation."""
    llm = engine(None)
    work = GREEDY + SAMPLED if sampled else GREEDY
    out = answers(llm, work), values(llm, work)
    llm.close()
    return out


def leaves(drafter: Any) -> list[Any]:
    """The drafters that look at ids, of a tree of hybrids."""
    parts = getattr(drafter, "drafters", None)
    return [leaf for part in parts for leaf in leaves(part)] if parts else [drafter] if drafter.source != "grammar" else []


def idle(llm: LLM) -> None:
    """Nothing is left of any request: no slot, no block, nothing in the drafters."""
    loop = llm.engine.loop
    while not loop.idle:
        llm.engine.driver.step(block=bool(loop.flight))
    loop.receiver.audit()
    for kv in loop.lanes:
        assert kv.usage()["used"] == 0
    for drafter in leaves(loop.drafter):
        for column in (drafter.cap, drafter.length, drafter.room, drafter.done):
            assert not column.any()


def check_run(spec: dict[str, Any], run: Run) -> None:
    """One engine: twice the same work, so that the second time prompts are in the cache and their ids in the drafters; nothing may differ."""
    _, rule, length, load = run
    llm = engine({**spec, "rule": rule, "length": LENGTHS[length]}, **LOADS[load])
    nodes = llm.engine.loop.log = Nodes()
    work = GREEDY + SAMPLED if rule == "keyed" else GREEDY
    want, logprobs = expected(rule == "keyed")
    assert answers(llm, work) == want, "first time"
    np.testing.assert_allclose(values(llm, work), logprobs, atol=1e-6)
    stats = llm.stats()
    assert not stats["faults"] and not stats["policy_errors"]
    assert length != "fixed" or stats["spec_num_accepted_tokens"] > 20
    assert stats["prefix_hits"] > 0 or load == "tight"
    assert stats["preemptions"] > 0 or load != "tight"
    assert max(sum(step.values()) for step in nodes.steps) <= llm.config.speculation.max_draft_tokens
    idle(llm)
    llm.close()
