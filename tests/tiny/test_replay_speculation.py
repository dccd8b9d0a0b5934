"""Runs with drafts replay: what a drafter answered is an input, and every decision made of it comes out byte-equal, in the engine and in the
simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from presage.core.errors import ReplayMismatch
from presage.core.plan import Draft, Grants, StepFault
from presage.engine.answers import RecordedAnswers, depths, draft_entry
from presage.engine.llm import LLM
from presage.engine.replay import read_frames, replay
from presage.simulate.rerun import RecordedOracle, kinds, read_run, rerun
from tests.tiny.speculation_work import GREEDY, LENGTHS, LOOK_UPS, MODELS, SAMPLED, collect, engine, params, send
from tests.tiny.test_simulate_plans import busy

FIXED = {"length": LENGTHS["fixed"]}
SPEED = {"method": "speed", "stride": 2}
MIXED = {"method": "hybrid", "drafters": [{"method": "suffix", "suffix_decoding_tree": True}, MODELS["early_exit tree"]]}
WAYS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("tokens", {**LOOK_UPS["suffix tree"], "length": {"policy": "marginal", "explore": 0.5}}, {}),
    ("shape", LOOK_UPS["suffix tree"], {}),
    ("tokens", {**LOOK_UPS["ngram"], **FIXED}, {"scheduling_policy": "layered", "scheduling_config": {"work": 24, "short": 16}}),
    ("shape", {**LOOK_UPS["ngram"], **FIXED, "rule": "rejection"}, {}),
    ("tokens", {**MODELS["model chain"], **FIXED}, {}),
    ("shape", {**MODELS["model tree"], "length": LENGTHS["goodput"], "rule": "block"}, {}),
    ("tokens", {**MODELS["early_exit chain"], **FIXED}, {}),
    ("shape", {**SPEED, **FIXED}, {}),
    ("tokens", {**MIXED, **FIXED, "rule": "without_replacement"}, {}),
]


def logged(folder: Path, level: str, spec: dict[str, Any], **settings: Any) -> LLM:
    """An engine with few seats, few blocks and small chunks, that writes a log."""
    return engine(
        spec, decision_log=str(folder), decision_log_level=level,
        **{"max_num_seqs": 6, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 9, "max_model_len": 256, **settings},
    )  # fmt: skip


def decisions(folder: Path) -> int:
    """How many a log holds."""
    return sum(tag == "d" for tag, _ in read_frames(folder))


@pytest.mark.parametrize(("level", "spec", "settings"), WAYS, ids=[f"{s['method']}-{s.get('rule', 'keyed')}-{level}" for level, s, _ in WAYS])
def test_runs_with_drafts_replay(tmp_path: Path, level: str, spec: dict[str, Any], settings: dict[str, Any]) -> None:
    llm = logged(tmp_path, level, spec, **settings)
    assert busy(llm) == 14
    stats = llm.stats()
    llm.close()
    made = decisions(tmp_path)
    assert replay(tmp_path) == rerun(tmp_path) == made > 20
    # How much adaptive policies draft depends on how busy this machine is.
    assert stats["spec_num_draft_tokens"] > (20 if spec.get("length") == LENGTHS["fixed"] else 0)
    assert stats["preemptions"] > 0 and not stats["policy_errors"]
    run = read_run(tmp_path)
    assert kinds(run)["Abort"] and RecordedOracle(run).walks == (level == "tokens" and spec.get("rule", "keyed") == "keyed")
    if level == "shape":
        assert not any(entry[-1] for entry in run.answers if entry[0] == "draft")


@pytest.mark.parametrize("level", ["tokens", "shape"])
def test_grammars_prefix_hits_and_refusals(tmp_path: Path, level: str) -> None:
    llm = logged(tmp_path, level, {**LOOK_UPS["suffix tree"], **FIXED}, max_model_len=512, num_gpu_blocks_override=14)
    work = GREEDY + SAMPLED
    for _ in range(2):
        llm.generate([p for p, _ in work], [s for _, s in work])
    refused = [send(llm, "no", params(), "wishes", draft={"num_speculative_tokens": "many"}), send(llm, "yes", params(), "plain")]
    ended = collect(llm, refused)
    stats = llm.stats()
    llm.close()
    assert isinstance(ended["wishes"], Exception) and len(ended["plain"]) == 40
    assert stats["prefix_hits"] > 0 and stats["spec_num_accepted_tokens"] > 100
    assert replay(tmp_path) == rerun(tmp_path) == decisions(tmp_path)
    assert ["refused", "wishes"] in read_run(tmp_path).answers


def test_accepted_paths_follow_from_what_was_said(tmp_path: Path) -> None:
    llm = logged(tmp_path, "tokens", {**LOOK_UPS["suffix tree"], **FIXED})
    busy(llm)
    llm.close()
    run, paths = read_run(tmp_path), 0
    judge = RecordedOracle._judge_drafts

    def walk(self: RecordedOracle, plan: Any, off: Any) -> Any:
        nonlocal paths
        verdict, done = judge(self, plan, off), run.done[plan.id]
        live = np.array([i for i, s in enumerate(plan.slot.tolist()) if s in self.replies])
        for i in live.tolist():
            assert verdict.path[verdict.path_off[i] : verdict.path_off[i + 1]].tolist() == done.path[done.path_off[i] : done.path_off[i + 1]].tolist()
            paths += int(done.path_off[i + 1] - done.path_off[i])
        return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedOracle, "_judge_drafts", walk)
        rerun(tmp_path)
    assert paths > 50


def tampered(folder: Path, old: bytes, new: bytes) -> None:
    """Change bytes of a log."""
    path = sorted(folder.glob("*.plog"))[0]
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_policies_are_run_and_not_copied(tmp_path: Path) -> None:
    spec = {**LOOK_UPS["ngram"], "length": {"policy": "fixed", "num_speculative_tokens": 6}}
    llm = logged(tmp_path, "tokens", spec)
    busy(llm, 6)
    llm.close()
    assert replay(tmp_path) == decisions(tmp_path)
    tampered(tmp_path, b"num_speculative_tokens\x06", b"num_speculative_tokens\x05")
    for again in (replay, rerun):
        with pytest.raises(ReplayMismatch):
            again(tmp_path)


def test_the_drafter_decides_too(tmp_path: Path) -> None:
    llm = logged(tmp_path, "tokens", {**LOOK_UPS["ngram"], **FIXED})
    busy(llm, 6)
    llm.close()
    path = sorted(tmp_path.glob("*.plog"))[0]
    kept = [[tag, [e for e in body if e[0] != "draft"] if tag == "c" else body] for tag, body in read_frames(tmp_path)]
    frames = [msgspec.msgpack.encode(frame) for frame in kept]
    path.write_bytes(b"".join(len(data).to_bytes(4, "little") + data for data in frames))
    with pytest.raises(ReplayMismatch, match="drafter for a draft where the log has"):
        replay(tmp_path)


def test_a_failed_pass_of_the_drafter_replays(tmp_path: Path) -> None:
    llm = logged(tmp_path, "tokens", {**MODELS["model chain"], **FIXED})
    step, seen = llm.engine.executor.step, []

    def fail(plan: Any) -> Any:
        if plan.lane:
            seen.append(plan.id)
        return StepFault(plan.id, "broken", plan.slot) if plan.lane and len(seen) == 3 else step(plan)

    llm.engine.executor.step = fail
    assert busy(llm) == 14
    stats = llm.stats()
    llm.close()
    assert stats["faults"] == 1 and len(seen) > 6
    assert replay(tmp_path) == decisions(tmp_path)
    with pytest.raises(ReplayMismatch, match="which no simulation would"):
        rerun(tmp_path)


def test_a_draft_comes_back_as_it_was() -> None:
    draft = Draft(
        np.array([0, 4, 4, 6], np.int32), np.arange(6, dtype=np.int32), np.array([-1, 0, 0, 1, -1, 0], np.int32),
        np.array([1, 2, 2, 3, 1, 2], np.int32), np.linspace(0.9, 0.1, 6).astype(np.float32), np.array([1, 1, 2, 1, 3, 3], np.uint8),
        np.array([0, 0, 5], np.int32), np.array([0, 1, -1], np.int32),
    )  # fmt: skip
    assert depths(draft.offset, draft.parent).tolist() == draft.depth.tolist()
    for tokens in (True, False):
        answers = RecordedAnswers([draft_entry(draft, tokens)])
        with pytest.raises(StopIteration) as ended:
            next(answers.propose(None, Grants.of([0, 1, 2], [1] * 3, 1)))  # type: ignore[arg-type]
        again: Draft = ended.value.value
        for name in ("offset", "parent", "depth", "prob", "source", "trial_node", "trial_q"):
            assert getattr(again, name).tolist() == getattr(draft, name).tolist()
        assert again.token.tolist() == (draft.token.tolist() if tokens else [0] * 6)
