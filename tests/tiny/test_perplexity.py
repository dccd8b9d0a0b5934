"""Perplexity: windows score every token once, steps are packed without loss, and the numbers are those of a plain computation."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from presage import LLM, SamplingParams
from presage.bench.perplexity import (
    Perplexity,
    Settings,
    Window,
    blocks_needed,
    compare,
    cut_windows,
    evaluate,
    pack,
    score,
    tokenise,
)
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError, NotEnoughMemory
from presage.core.types import Want
from presage.execute.executor import TorchExecutor
from presage.execute.sampling.sampler import Sampler
from presage.models.base import Model
from presage.models.loading import open_checkpoint
from presage.serve.cli import main
from presage.serve.cli_eval import perplexity, read_documents, run_all, variants
from presage.tokenize.tokenizer import Tokenizer
from tests.tiny.families import write_checkpoint
from tests.tiny.plans import Part
from tests.tiny.rig import Rig, geometry_of, load

TEXT = "def area(width, height):\n    return width * height\n\n\nclass Square:\n    def __init__(self, side):\n        self.side = side\n" * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("presage-tiny")


@pytest.fixture(scope="module")
def bundled() -> TorchExecutor:
    """The bundled model on the kernels that serve."""
    return executor_of(load(open_checkpoint("presage-tiny").path, torch.bfloat16))


def executor_of(model: Model, blocks: int = 60) -> TorchExecutor:
    """An executor, not started."""
    return TorchExecutor(model, geometry_of(model, blocks), Sampler(model.vocab_size), depth=1)


def random_windows(count: int, settings: Settings, vocab: int = 300) -> list[Window]:
    """Windows of one document of random ids."""
    return list(cut_windows(np.random.default_rng(0).integers(0, vocab, count).astype(np.int32), settings))


def plain(window: Window, logits: torch.Tensor) -> float:
    """Cross entropy of a window from its logits [inputs, V]."""
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(window.ids[1:]).long(), reduction="none")
    return float(loss[window.first - 1 :].sum())


@given(n=st.integers(0, 60), context=st.integers(1, 20), stride=st.integers(1, 20), bos=st.booleans())
def test_every_token_is_scored_once_behind_enough_context(n: int, context: int, stride: int, bos: bool) -> None:
    if stride > context:
        with pytest.raises(ConfigError):
            Settings(context, stride)
        return
    prefix = [-7] if bos else []
    windows = list(cut_windows(np.arange(n, dtype=np.int32), Settings(context, stride), prefix))
    scored = np.concatenate([w.ids[w.first :] for w in windows]) if windows else np.empty(0)
    assert scored.tolist() == list(range(0 if bos else 1, n))
    for w in windows:
        assert len(w.ids) - 1 <= context and w.first >= 1
        assert w.ids[: len(prefix)].tolist() == prefix and (np.diff(w.ids[len(prefix) :]) == 1).all()
        assert w.first >= min(int(w.ids[w.first]) + len(prefix), context - stride + 1)


@given(lengths=st.lists(st.integers(1, 12), max_size=12), rows=st.integers(1, 15), seats=st.integers(1, 4))
def test_packed_steps_run_every_row_once_in_order(lengths: list[int], rows: int, seats: int) -> None:
    steps = list(pack(lengths, rows, seats))
    assert [(w, t) for step in steps for w, s, c in step for t in range(s, s + c)] == [(w, t) for w, n in enumerate(lengths) for t in range(n)]
    assert all(sum(c for _, _, c in step) <= rows and len({w for w, _, _ in step}) == len(step) <= seats for step in steps)


@pytest.mark.parametrize("case", ["llama", "mistral", "gpt2", "gemma2"])
def test_it_is_the_cross_entropy_of_transformers(case: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    reference = write_checkpoint(case, tmp_path)
    windows = random_windows(150, Settings(40, 17)) + random_windows(5, Settings(40, 17))
    with torch.inference_mode():
        wanted = [plain(w, reference(torch.from_numpy(w.ids[None, :-1]).long()).logits[0]) for w in windows]
    # 23 rows a step cut windows of 40 in two or three and put ends and beginnings together.
    found = score(executor_of(load(tmp_path)), windows, 23, tokenizer, "")
    np.testing.assert_allclose(found.nll, wanted, rtol=1e-4)
    assert found.complete and found.tokens.sum() == 149 + 4
    assert found.value == pytest.approx(math.exp(sum(wanted) / 153), rel=1e-4)


def test_it_is_the_perplexity_of_the_reference_twins(bundled: TorchExecutor, tokenizer: Tokenizer) -> None:
    (ids,), prefix = tokenise(tokenizer, [TEXT])
    windows = list(cut_windows(ids, Settings(64, 40), prefix))
    rig, total = Rig(load(open_checkpoint("presage-tiny").path, torch.bfloat16, "reference")), 0.0
    for slot, w in enumerate(windows):
        total += plain(w, rig.logits([Part(slot, 0, w.ids[:-1].tolist(), want=Want.NONE)])[0])
    found = score(bundled, windows, 128, tokenizer, "")
    assert found.value == pytest.approx(math.exp(total / (len(ids) - 1)), rel=5e-3)
    assert found.nbytes.sum() == len(TEXT.encode()) - len(tokenizer.token_bytes(int(ids[0])))
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens.sum() / found.nbytes.sum() / math.log(2))
    assert 2 < found.value < 60  # a model of Python, unlike the 4,096 of a random one


def test_it_is_what_the_engine_says_of_a_prompt(bundled: TorchExecutor, tokenizer: Tokenizer) -> None:
    llm = LLM("presage-tiny", threads=1, num_gpu_blocks_override=40, max_num_batched_tokens=48)
    try:
        (out,) = llm.generate(TEXT, SamplingParams(max_tokens=1, prompt_logprobs=0))
    finally:
        llm.close()
    assert out.prompt_logprobs is not None
    said = [entry[i].logprob for i, entry in zip(out.prompt_token_ids, out.prompt_logprobs, strict=True) if entry]
    (ids,), _ = tokenise(tokenizer, [TEXT])
    found = score(bundled, list(cut_windows(ids, Settings(256, 256))), 128, tokenizer, "")
    assert found.windows == 1 and found.tokens.tolist() == [len(said)]
    assert found.nll[0] == pytest.approx(-sum(said), rel=1e-6)


def test_steps_of_any_size_give_the_same_bits(bundled: TorchExecutor, tokenizer: Tokenizer) -> None:
    windows = random_windows(300, Settings(70, 33), 4096)
    results = [score(bundled, windows, rows, tokenizer, "").nll for rows in (19, 64, 500)]
    assert results[0].tolist() == results[1].tolist() == results[2].tolist()


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reference = write_checkpoint("llama", tmp_path)
    torch.nn.init.zeros_(reference.lm_head.weight)
    reference.save_pretrained(tmp_path)
    assert score(executor_of(load(tmp_path)), random_windows(90, Settings(32, 32)), 50, tokenizer, "").value == pytest.approx(300, rel=1e-6)


def test_kv_blocks_suffice_and_too_few_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_checkpoint("llama", tmp_path)
    model, settings = load(tmp_path), Settings(100, 50, rows=128)
    short = [w for n in range(2, 80) for w in random_windows(n % 9 + 2, settings)]
    windows = random_windows(400, settings) + short + random_windows(400, settings)
    enough = score(executor_of(model, blocks_needed(settings, 32)), windows, settings.rows, tokenizer, "")
    assert enough.nll.tolist() == score(executor_of(model, 500), windows, settings.rows, tokenizer, "").nll.tolist()
    with pytest.raises(NotEnoughMemory):
        score(executor_of(model, 8), windows, settings.rows, tokenizer, "")


def test_ids_and_lengths_beyond_the_model_are_refused(bundled: TorchExecutor, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError):
        score(bundled, [Window(np.array([1, 4096], np.int32), 1)], 8, tokenizer, "")
    with pytest.raises(ConfigError):
        score(bundled, [Window(np.ones(bundled.model.max_len + 2, np.int32), 1)], 8, tokenizer, "")
    with pytest.raises(ConfigError, match="more than the model's length"):
        evaluate(EngineConfig(), [TEXT], Settings(4096, 512))


def made(label: str, nll: list[float], tokens: list[int]) -> Perplexity:
    """A result by hand."""
    return Perplexity(label, len(tokens), np.array(nll), np.array(tokens[: len(nll)]), np.array(tokens[: len(nll)]) * 4)


def test_changes_are_paired_by_window() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 50, 200)
    base = rng.normal(3, 1, 200) * tokens
    same = compare(made("a", base.tolist(), tokens.tolist()), made("b", (base + 0.01 * tokens).tolist(), tokens.tolist()))
    assert (same.relative, same.low, same.high) == pytest.approx((math.expm1(0.01),) * 3)
    noisy = base + (0.01 + rng.normal(0, 0.05, 200)) * tokens
    change = compare(made("a", base.tolist(), tokens.tolist()), made("b", noisy.tolist(), tokens.tolist()))
    # The standard error of 200 windows is 0.05 / sqrt(200) and somewhat more for their different sizes.
    assert change.low < change.relative < change.high and 0.012 < change.high - change.low < 0.022
    half = compare(made("a", base.tolist(), tokens.tolist()), made("b", noisy[:80].tolist(), tokens.tolist()))
    assert half.relative == pytest.approx(math.expm1((noisy - base)[:80].sum() / tokens[:80].sum()))
    with pytest.raises(ConfigError):
        compare(made("a", [1.0, 2.0], [3, 4]), made("b", [1.0, 2.0], [4, 3]))
    assert math.isnan(compare(made("a", [1.0], [3, 4]), made("b", [2.0], [3, 4])).low)


def test_an_interrupt_keeps_what_was_scored(bundled: TorchExecutor, tokenizer: Tokenizer) -> None:
    windows = random_windows(300, Settings(40, 40), 4096)
    whole = score(bundled, windows, 100, tokenizer, "")

    def stop(p: Perplexity) -> None:
        if len(p.nll) == 3:
            signal.raise_signal(signal.SIGINT)

    part = score(bundled, windows, 100, tokenizer, "", stop)
    assert not part.complete and part.nll.tolist() == whole.nll[:3].tolist()


def test_documents_are_files_rows_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028x", "code": "c"}\n\n{"text": "zwei"}\n', encoding="utf-8")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.txt").write_text(" \n")
    assert read_documents(tmp_path) == ["one\u2028x", "zwei", "two\r\nlines"]
    for path, field, said in [
        (tmp_path / "none.txt", "text", "cannot be read"), (tmp_path / "c.bin", "text", "not UTF-8"), (tmp_path / "d.txt", "text", "no text"),
        (tmp_path / "a.jsonl", "code", "row 3"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            read_documents(path, field)


def test_variants_are_quantizations_and_checkpoints(tmp_path: Path) -> None:
    base = EngineConfig.of(model="presage-tiny", quantization="w8a8")
    (_, quantised), (_, stored) = variants(base, f"w4a8-g64, {tmp_path}")
    assert (quantised.model.model, quantised.model.quantization) == ("presage-tiny", "w4a8-g64")
    assert (stored.model.model, stored.model.quantization) == (str(tmp_path), None)
    with pytest.raises(ConfigError):
        variants(base, "w3a3")


def test_the_command_compares_and_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "t.py", tmp_path / "out.json"
    text.write_text(TEXT)
    words = ["eval", "perplexity", "presage-tiny", "--data", str(text), "--context", "64", "--stride", "32", "--against", "w8a8"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--json", str(out), "--threads", "1"])
    assert end.value.code == 0
    first, second = json.loads(out.read_text())["results"]
    assert (first["label"], second["label"]) == ("bfloat16", "w8a8") and first["windows"] == first["of_windows"] == 3
    assert second["low"] <= second["change"] <= second["high"] and abs(second["change"]) < 0.05
    assert second["change"] == pytest.approx(second["perplexity"] / first["perplexity"] - 1)
    shown = capsys.readouterr().out
    assert f"{first['perplexity']:.4f}" in shown and f"{second['change']:+.2%}" in shown


def test_an_interrupted_command_prints_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import presage.bench.perplexity as module

    real = module.evaluate
    text = tmp_path / "t.py"
    text.write_text(TEXT)

    def interrupted(config: EngineConfig, documents: list[str], settings: Settings, label: str, watch: object, progress: bool) -> Perplexity:
        def stop(p: Perplexity) -> None:
            signal.raise_signal(signal.SIGINT) if len(p.nll) == 2 else None

        return real(config, documents, settings, label, stop)

    monkeypatch.setattr(module, "evaluate", interrupted)
    assert perplexity("presage-tiny", data=str(text), context=64, stride=32, against="w8a8") == 130
    shown = capsys.readouterr().out
    assert "(2/" in shown and "w8a8" not in shown
    assert run_all([], [TEXT], Settings()) == []
