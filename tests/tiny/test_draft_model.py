"""Drafters with forward passes: whatever they draft, and whatever happens to their lane, tokens are those of the engine without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from presage import LLM
from presage.bundled import bundled_path
from presage.core.errors import ConfigError, PresageError
from presage.execute import executor as executor_module
from presage.execute.propose import Proposed
from tests.tiny.speculation_work import GREEDY, SAMPLED, answers, collect, engine, expected, idle, params, send

DRAFT, SAME = "presage-tiny-draft", "presage-tiny"
MODEL = {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 4}
SUFFIX = {"method": "suffix"}
CASES: dict[str, dict[str, Any]] = {
    "chain": MODEL,
    "tree": {"method": "model", "model": DRAFT, "num_speculative_tokens": 7, "tree_width": 3, "tree_depth": 3},
    "early exit": {"method": "early_exit", "exit_layer": 4, "num_speculative_tokens": 3},
    "early exit tree": {"method": "early_exit", "exit_layer": 3, "num_speculative_tokens": 6, "tree_width": 2, "tree_depth": 3},
    "speed": {"method": "speed", "stride": 2},
    "merged": {"method": "hybrid", "drafters": [SUFFIX, MODEL, {"method": "early_exit"}], "num_speculative_tokens": 4},
    "threshold": {"method": "hybrid", "combine": "threshold", "tau": 1.5, "drafters": [SUFFIX, MODEL]},
}
FIXED = {"policy": "fixed", "num_speculative_tokens": 6}
TIGHT: dict[str, Any] = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 64}
WORK = GREEDY + SAMPLED


def drafting(case: str | dict[str, Any], length: Any = FIXED, rule: str = "keyed", **settings: Any) -> LLM:
    spec = CASES[case] if isinstance(case, str) else case
    return engine({**spec, "length": length, "rule": rule}, **settings)


def done(llm: LLM) -> dict[str, Any]:
    """Nothing is left in any lane; the counters of the run."""
    idle(llm)
    stats = llm.stats()
    assert not stats["policy_errors"]
    llm.close()
    return stats


@pytest.mark.parametrize("case", list(CASES))
def test_tokens_are_those_of_a_run_without_drafts(case: str) -> None:
    want, _ = expected(True)
    llm = drafting(case)
    assert answers(llm, WORK) == want, "first time"
    assert answers(llm, WORK) == want, "again: the prompts' blocks are in both caches"
    lanes = llm.engine.loop.lanes
    assert all(kv.usage()["hits"] > 0 for kv in lanes)
    stats = done(llm)
    assert stats["spec_num_accepted_tokens"] > 60 and not stats["faults"]
    assert len(lanes) == 1 + ("model" in json.dumps(CASES[case]))


@pytest.mark.parametrize("length", ["marginal", {"policy": "goodput", "explore_every": 5}], ids=["marginal", "goodput"])
@pytest.mark.parametrize("case", ["tree", "threshold"])
def test_tokens_do_not_depend_on_the_length_policy(case: str, length: Any) -> None:
    llm = drafting(case, length)
    assert answers(llm, WORK) == expected(True)[0]
    done(llm)


@pytest.mark.parametrize("case", list(CASES))
def test_chunks_and_preemption_do_not_change_tokens(case: str) -> None:
    llm = drafting(case, **TIGHT)
    assert answers(llm, WORK) == expected(True)[0]
    stats = done(llm)
    assert stats["preemptions"] > 0 and stats["spec_num_accepted_tokens"] > 0 and not stats["faults"]


@pytest.mark.parametrize("memory", [{}, TIGHT], ids=["roomy", "tight"])
def test_a_target_that_drafts_for_itself_is_always_right(memory: dict[str, Any]) -> None:
    """Whatever rows were kept, hit, rewound or computed again in the lane: one wrong key would make it guess wrong."""
    plain = [(p, s) for p, s in WORK if s.structured_outputs is None]
    llm = drafting({"method": "model", "model": SAME, "num_speculative_tokens": 5}, **memory)
    for _ in range(2):
        assert answers(llm, plain) == [w for w, (_, s) in zip(expected(True)[0], WORK) if s.structured_outputs is None]
    stats = done(llm)
    # What follows a stop is cut, and so is a draft that is right but goes beyond it.
    assert stats["spec_num_draft_tokens"] >= stats["spec_num_accepted_tokens"] >= stats["spec_num_draft_tokens"] - 4 > 200
    assert stats["preemptions"] > 0 or not memory


@pytest.mark.parametrize(
    "spec", [{"method": "early_exit", "exit_layer": 2}, {"method": "speed", "stride": 2}, {"method": "speed", "stride": 1}], ids=str
)
def test_exits_of_a_target_whose_later_layers_do_nothing_are_always_right(spec: dict[str, Any], tmp_path: Path) -> None:
    """One wrong key or a state taken from the bank at the wrong place would make it guess wrong."""
    source = bundled_path(SAME)
    assert source is not None
    tensors = load_file(source / "model.safetensors")
    for name, t in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and int(name.split(".")[2]) >= spec.get("exit_layer", spec.get("stride")):
            t.zero_()
    shutil.copytree(source, tmp_path / "shallow")
    save_file(tensors, tmp_path / "shallow" / "model.safetensors", metadata={"format": "pt"})
    # Guesses of a pipeline do not see penalties for the tokens in flight.
    plain = [(p, s) for p, s in WORK if s.structured_outputs is None and s.repetition_penalty == 1]
    found = []
    for speculative in (None, {**spec, "length": FIXED}):
        llm = LLM(str(tmp_path / "shallow"), threads=1, max_num_seqs=16, max_model_len=512, kv_cache_memory="32MiB", speculative_config=speculative)
        found.append(answers(llm, plain))
        stats = llm.stats()
        llm.close()
    assert found[0] == found[1]
    assert stats["spec_num_draft_tokens"] >= stats["spec_num_accepted_tokens"] >= stats["spec_num_draft_tokens"] - 4 > 100


# ---- models that do not fit


def other_draft(folder: Path, **config: Any) -> str:
    """The bundled draft model with another configuration; a smaller vocabulary drops rows of its embedding."""
    source = bundled_path(DRAFT)
    assert source is not None
    shutil.copytree(source, folder)
    settings = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][: settings["vocab_size"]].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_shorter_draft_model_drafts_as_far_as_it_reaches(tmp_path: Path) -> None:
    llm = drafting({**MODEL, "model": other_draft(tmp_path / "short", max_position_embeddings=48)})
    assert answers(llm, WORK) == expected(True)[0]
    assert answers(llm, [("x = 1\n" * 20, params())])[0][0][2] == "length"
    stats = done(llm)
    assert stats["spec_num_accepted_tokens"] > 10 and not stats["faults"]


def test_models_that_cannot_draft_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**MODEL, "model": other_draft(tmp_path / "small", vocab_size=4000)}, "4000 ids and the target's 4096"),
        ({**MODEL, "model": str(tmp_path / "nowhere")}, "nowhere"),
        ({**MODEL, "tree_width": 0}, "tree_width"),
        ({**MODEL, "min_prob": 1.0}, "min_prob"),
        ({**MODEL, "quantization": "w0a0"}, "w0a0"),
        ({"method": "model"}, "model"),
        ({"method": "early_exit", "exit_layer": 6}, "exit_layer"),
        ({"method": "hybrid", "drafters": [MODEL] * 4}, "at most 3"),
    ]
    for spec, reason in wrong:
        with pytest.raises(PresageError, match=reason):
            drafting(spec)


# ---- things that happen while a drafter's pass is out


def passing(llm: LLM) -> None:
    """Turn until a drafter's pass is in flight."""
    loop = llm.engine.loop
    for _ in range(200):
        llm.engine.driver.step(block=bool(loop.flight))
        if loop.side is not None:
            return
    raise AssertionError("nobody drafts")


@pytest.mark.parametrize("case", ["tree", "early exit", "merged"])
def test_aborts_while_a_drafter_computes_leave_nothing_behind(case: str) -> None:
    llm = drafting(case)
    left = [send(llm, p, s, f"r{i}") for i, (p, s) in enumerate(GREEDY)]
    while left:
        passing(llm)
        llm.engine.abort(left.pop().id)
        llm.engine.driver.step()
    idle(llm)
    llm._inbox.clear()
    assert answers(llm, GREEDY) == expected(False)[0]
    done(llm)


@pytest.mark.parametrize("case", list(CASES))
def test_a_fault_in_a_drafters_pass_loses_no_request(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = executor_module.propose, 0

    def now_and_then(*args: Any) -> Proposed:
        nonlocal calls
        calls += 1
        if calls % 9 == 5:
            raise MemoryError("no room for a guess")
        return real(*args)

    monkeypatch.setattr(executor_module, "propose", now_and_then)
    llm = drafting(case)
    assert answers(llm, WORK) == expected(True)[0]
    assert answers(llm, WORK) == expected(True)[0], "new requests are drafted for again"
    assert done(llm)["faults"] > 1


def test_a_request_may_refuse_the_draft_model() -> None:
    llm = drafting("chain")
    out = collect(llm, [send(llm, *GREEDY[0], "none", draft={"method": "none"})])
    assert out["none"] == expected(False)[0][0][0][0]
    assert done(llm)["spec_num_draft_tokens"] == 0
    with pytest.raises(ConfigError, match="num_speculative_tokens"):
        drafting({**MODEL, "num_speculative_tokens": 0})
