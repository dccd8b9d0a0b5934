"""Hand-made steps, their traffic, and the profile of a step: checked against the engine, against the walk, and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import presage.serve.cli_profile
from presage import LLM, SamplingParams
from presage.bench.profile import Case, clocked, profile_steps, step_work
from presage.bench.steps import FixedSteps
from presage.bench.timed_ops import TimedOps
from presage.bench.traffic import step_bytes
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.types import Want
from presage.execute.executor import TorchExecutor
from presage.execute.sampling.sampler import Sampler
from presage.layers.ops import build_ops
from presage.models.loading import open_checkpoint
from presage.models.registry import build_model
from presage.serve.cli import main
from tests.tiny.families import write_checkpoint
from tests.tiny.rig import geometry_of

SMALL = {"kernels": "reference", "max_num_seqs": 4, "max_model_len": 256, "num_gpu_blocks_override": 40}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM("presage-tiny", **SMALL)
    yield made
    made.engine.executor.start(made.engine.driver.post)
    made.close()


@pytest.fixture(scope="module")
def executor(llm: LLM) -> TorchExecutor:
    """The engine's executor without its thread."""
    llm.engine.executor.close()
    return llm.engine.executor


def of(case: str, folder: Path) -> TorchExecutor:
    """An executor, not started, on a tiny model of a family."""
    write_checkpoint(case, folder, torch.float32)
    model = build_model(open_checkpoint(str(folder)), torch.float32, TimedOps(build_ops("reference", torch.float32, 1)), max_len=256)
    return TorchExecutor(model, geometry_of(model), Sampler(model.vocab_size), depth=1)


def test_a_fixed_step_decides_what_the_engine_decides(executor: TorchExecutor) -> None:
    fixed = FixedSteps(executor, 2, 70, rows=4)
    plan = fixed.plan()
    new = [fixed.run(plan).new.tolist() for _ in range(2)]
    prompts = [[*fixed.ids[0, :70], fixed.ids[slot, 70]] for slot in (0, 1)]
    fixed.close()
    assert new[0] == new[1] and len(new[0]) == 2  # the same step again, on the same cache
    other = LLM("presage-tiny", **SMALL)
    try:
        wanted = other.generate([[int(t) for t in p] for p in prompts], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    finally:
        other.close()
    assert new[0] == [o.outputs[0].token_ids[0] for o in wanted]


def test_draft_nodes_are_judged_as_if_decoded(executor: TorchExecutor) -> None:
    fixed = FixedSteps(executor, 1, 40, rows=6)
    try:
        for k in range(5):  # write the greedy continuation into the ids
            fixed.ids[0, 41 + k] = fixed.run(fixed.plan(start=40 + k)).new[0]
        done = fixed.run(fixed.plan(nodes=4))
        assert done.new.tolist() == fixed.ids[0, 41:46].tolist() and done.path.tolist() == [0, 1, 2, 3]
        fixed.ids[0, 43] = (fixed.ids[0, 43] + 1) % executor.model.vocab_size
        done = fixed.run(fixed.plan(nodes=4))
        assert len(done.new) == 3 and done.path.tolist() == [0, 1]
    finally:
        fixed.close()


def test_windows_keep_their_blocks_in_a_ring(tmp_path: Path) -> None:
    executor = of("mistral", tmp_path)
    assert [g.window for g in executor.geometry.groups] == [7]
    rows = []
    for chunk in (32, 512):
        fixed = FixedSteps(executor, 2, 150, rows=2, chunk=chunk)
        fixed.ids[1] = fixed.ids[0]
        fixed.run(fixed.plan())
        logits = executor.run.work.take("logits", 2, executor.model.vocab_size, torch.float32).clone()
        assert torch.isfinite(logits).all() and torch.equal(logits[0], logits[1])  # the second sequence is a copy
        rows.append(logits[0])
        blocks = [fixed._blocks(0, slot, 152) for slot in (0, 1)]
        assert not set(blocks[0]) & set(blocks[1]) and 0 not in blocks[0] and len(set(blocks[0])) == (3 if chunk == 32 else 5)
        fixed.close()
    torch.testing.assert_close(*rows)  # the ring lost nothing that the window sees


def test_what_does_not_fit_is_refused(executor: TorchExecutor) -> None:
    for arguments, word in (((9, 200), "blocks"), ((1, 256), "length"), ((0, 8), "at least one"), ((1, -1), "at least one")):
        with pytest.raises(ConfigError, match=word):
            FixedSteps(executor, *arguments)
    fixed = FixedSteps(executor, 1, 8, rows=2)
    with pytest.raises(ConfigError, match="room"):
        fixed.plan(nodes=2)
    fixed.close()


def test_traffic_counted_by_hand(executor: TorchExecutor) -> None:
    model, fixed = executor.model, FixedSteps(executor, 3, 33, rows=3)
    p, size = model.params, model.embedding.element_size()
    plan = fixed.plan(nodes=2)
    work, calls = step_work(executor, plan)
    fixed.close()
    wide = (p.heads + 2 * p.kv_heads) * p.head_dim
    assert work["attn_in"].nbytes == p.layers * p.d * wide * size and work["attn_in"].operations == 2 * 9 * p.layers * p.d * wide
    assert work["mlp"].nbytes == p.layers * 3 * p.d * p.ff * size
    assert work["attend"].nbytes == p.layers * 3 * 36 * 2 * p.kv_heads * p.head_dim * size
    assert work["attend"].operations == p.layers * 3 * (34 + 35 + 36) * 4 * p.heads * p.head_dim
    assert work["head"].nbytes == p.d * p.vocab_size * size and work["head"].operations == 2 * 9 * p.d * p.vocab_size
    assert calls["mlp"] == p.layers and calls["head"] == 1
    assert step_bytes(executor, plan) == sum(w.nbytes for w in work.values())


def test_only_chosen_experts_are_read(tmp_path: Path) -> None:
    executor = of("mixtral", tmp_path)
    fixed = FixedSteps(executor, 1, 5)
    work, calls = step_work(executor, fixed.plan())
    experts = [layer.stages[-2].fn.__self__ for layer in executor.model.layers]  # type: ignore[union-attr]
    assert calls["experts"] == len(experts) and experts[0].top_k < experts[0].count
    assert work["experts"].nbytes == sum(e.top_k * 3 * e.d * e.ff * 4 for e in experts)
    assert work["experts"].operations == sum(e.top_k * 6 * e.d * e.ff for e in experts)


def test_the_clocked_step_is_the_step(tmp_path: Path) -> None:
    executor = of("llama", tmp_path)
    timed = executor.model.ops
    assert isinstance(timed, TimedOps)
    fixed = FixedSteps(executor, 2, 20)
    plan = fixed.plan()
    fixed.run(plan)
    logits = executor.run.work.take("logits", 2, executor.model.vocab_size, torch.float32)
    before = logits.clone()
    with torch.inference_mode():
        logits.fill_(0)
    timed.take()
    ticks = iter(range(1000))
    spent = clocked(executor, plan, lambda: float(next(ticks)))
    assert torch.equal(logits, before)
    layers = len(executor.model.layers)
    assert list(spent) == ["assemble", "embed", "attn_in", "attend", "attn_out", "mlp", "head", "sampling"]
    assert spent["mlp"] == spent["attend"] == layers and sum(spent.values()) == 4 * layers + 4
    found = timed.take()
    assert len(found["attention"]) == len(found["rope_write"]) == layers and len(found["embedding"]) == 1
    assert sum(len(v) for k, v in found.items() if k.startswith("linear")) == 4 * layers + 1 and not timed.take()
    unjudged = clocked(executor, fixed.plan(want=Want.NONE))
    assert "head" not in unjudged and min(unjudged.values()) >= 0


def test_profiles_of_an_engine() -> None:
    config = EngineConfig.of(model="presage-tiny", kernels="reference", max_model_len=128)
    cases = [Case(1, 40), Case(3, 40, nodes=2)]
    found = profile_steps(config, cases, repeats=2)
    assert [p.batch for p in found] == [1, 3] and all(p.loop > 0 and p.step > 0 and p.read > 1e8 for p in found)
    for p in found:
        assert sum(part.seconds for part in p.parts) == pytest.approx(p.step) and p.parts[-1].name == "other"
    assert found[1].nbytes > found[0].nbytes and not found[0].kernels
    timed = profile_steps(config, cases[:1], repeats=2, kernels=True)[0]
    assert np.isnan(timed.loop) and timed.kernels[0].seconds >= timed.kernels[-1].seconds
    assert timed.nbytes == found[0].nbytes


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["profile", "step", *words, "--kernels", "reference", "--max-model-len", "128", "--repeats", "1"])
    return int(ended.value.code or 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert presage.serve.cli_profile.profile.name == ("profile",)
    target = tmp_path / "profile.json"
    assert command("--batch", "1,2", "--context", "20", "--draft-nodes", "1", "--per-kernel", "--json", str(target)) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("attend", "final norm, head", "of read", "batch 2", "1 draft node each", "us a call"))
    found = json.loads(target.read_text())
    assert [p["batch"] for p in found] == [1, 2] and found[0]["loop"] is None and found[0]["nbytes"] > 0
    for words, complaint in ((["--batch", "1,x"], "batch sizes"), (["--batch", "0"], "batch sizes"), (["--context", "500"], "length")):
        assert command(*words) == 1
        assert complaint in capsys.readouterr().err
