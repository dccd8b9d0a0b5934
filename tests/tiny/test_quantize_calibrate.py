"""Calibrated quantisation: compensation beats rounding, folding changes nothing, and what is written runs on the integer kernels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from presage.bundled import bundled_path
from presage.core.errors import CheckpointError, ConfigError, UnsupportedModel
from presage.layers.ops import build_ops
from presage.models.base import Model
from presage.models.loading import open_checkpoint
from presage.models.registry import build_model
from presage.quantize.awq import awq_scale
from presage.quantize.calibrate import Report, Settings, calibrate, fitting, form_of
from presage.quantize.canonical import Canonical
from presage.quantize.gptq import Form, output_error, quantize_gptq, round_nearest
from presage.quantize.observe import ObservingOps, Stats, Stream, read_text, windows
from presage.quantize.sites import sites_of
from presage.quantize.smoothquant import smooth_scale
from presage.serve.cli import main
from presage.tokenize import Tokenizer
from tests.tiny.families import write_checkpoint as write_tiny
from tests.tiny.plans import Part
from tests.tiny.rig import Rig

DRAFT = "presage-tiny-draft"
FORMS = [Form(4, 32, True, 8), Form(4, 64, False, 8), Form(4, 128, True, 16), Form(8, 0, True, 8)]
FOLDED = ["llama", "llama_mqa_tied_bias", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3", "olmo2"]


def correlated(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Inputs as activations are: correlated, a few channels much larger than the rest."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g) + 0.3 * torch.randn(rows, k, generator=g)
    mixed[:, :: k // 8] *= 8
    return mixed


def observing(folder: Path | str) -> Model:
    return build_model(open_checkpoint(folder), torch.float32, ObservingOps())


def served(folder: Path | str, kernels: Literal["cpu", "reference"]) -> Model:
    """In float32, by one thread."""
    return build_model(open_checkpoint(folder), torch.float32, build_ops(kernels, torch.float32, 1))


def spans(ids: torch.Tensor) -> list[Part]:
    """Every row of ids a sequence."""
    return [Part(slot, 0, row.tolist()) for slot, row in enumerate(ids)]


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Of all tokens, through the calibration's own walk."""
    with torch.inference_mode():
        stream = Stream(model, ids)
        for i in range(len(model.layers)):
            assert list(stream.run(i))[-1] == len(ids)
        return model.head(stream.h, stream.work).clone()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compensation_loses_less_than_rounding(form: Form, act_order: bool) -> None:
    x, w = correlated(1024, 256), torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    stats = Stats(256)
    for part in x.split(300):
        stats.see(part)
    assert torch.allclose(stats.hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-3) and torch.allclose(stats.mean, x.abs().mean(0), rtol=1e-4)
    assert torch.equal(stats.peak, x.abs().amax(0))
    nearest, best = round_nearest(w, form), quantize_gptq(w, stats.hessian, form, act_order=act_order)
    errors = [(x @ (w - q.unpack()).T).square().sum() / (x @ w.T).square().sum() for q in (nearest, best)]
    assert errors[1] < 0.75 * errors[0]
    assert output_error(w, best.unpack(), stats.hessian) == pytest.approx(errors[1].item(), rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_unrelated_inputs_leave_nothing_to_compensate(form: Form) -> None:
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(2))
    best, nearest = quantize_gptq(w, torch.eye(256), form), round_nearest(w, form)
    assert torch.equal(best.codes, nearest.codes) and torch.equal(best.scale, nearest.scale)
    assert (best.zero is None) == (nearest.zero is None) == form.symmetric


def test_hard_second_moments() -> None:
    """Inputs that never are anything get zeros; ones that are copies of others make the factorisation need damping."""
    form, w, x = Form(4, 32, True, 8), torch.randn(8, 64), correlated(16, 64)
    x[:, 5] = 0
    hessian = x.T @ x
    q = quantize_gptq(w, hessian, form, damp=0.0)
    assert not q.unpack()[:, 5].any() and torch.isfinite(q.unpack()).all()
    with pytest.raises(ConfigError, match="not finite"):
        quantize_gptq(w, hessian * float("nan"), form)
    with pytest.raises(ConfigError, match="do not fit"):
        quantize_gptq(w[:, :48], hessian[:48, :48], form)


@pytest.mark.parametrize("case", FOLDED)
def test_folding_changes_the_weights_and_not_the_function(case: str, tmp_path: Path) -> None:
    write_tiny(case, tmp_path)
    ids = torch.arange(60).view(2, 30) * 4 + 3
    before, model = logits(observing(tmp_path), ids), observing(tmp_path)
    changed: dict[str, torch.Tensor] = {}
    folded = 0
    for i in range(len(model.layers)):
        for site in sites_of(model, i):
            s = site.shared(torch.rand(site.cell.k) * 3 + 0.2)
            if site.source is not None:
                old, folded = site.cell.dense().clone(), folded + 1
                changed |= site.fold(s)
                assert not torch.equal(old, site.cell.dense())
    assert folded >= len(model.layers) * (1 if case == "qwen3_moe" else 2)
    after = logits(model, ids)
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
    source = open_checkpoint(tmp_path)
    assert all(changed[name].shape == source.get(name).shape and changed[name].dtype == source.get(name).dtype for name in changed)


def test_a_gain_that_is_stored_rounded_is_made_good_in_the_weights(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, torch.bfloat16)
    ids = torch.arange(40).view(2, 20)
    before, model = logits(observing(tmp_path), ids), observing(tmp_path)
    site = sites_of(model, 0)[0]
    site.cell.watch()
    list(Stream(model, ids).run(0, keep=False))
    stats = site.cell.stats
    assert stats is not None and stats.count == 40
    (gain,) = site.fold(smooth_scale(site)).values()
    assert gain.dtype == torch.bfloat16
    assert (logits(model, ids) - before).abs().max() < 1e-5 * before.abs().max()
    folded = stats.hessian.clone()
    site.cell.watch()
    list(Stream(model, ids).run(0, keep=False))
    assert site.cell.stats is not None and torch.allclose(site.cell.stats.hessian, folded, rtol=1e-3, atol=1e-6)


def test_scales_help_where_channels_differ(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    model = observing(tmp_path)
    site, form = sites_of(model, 0)[3], Form(4, 32, True, 8)
    site.cell.watch()
    assert site.cell.stats is not None
    assert torch.equal(awq_scale(site, form), torch.ones(site.cell.k)) and torch.equal(smooth_scale(site), torch.ones(site.cell.k))
    site.cell.stats.see(correlated(500, site.cell.k))

    def error() -> float:
        assert site.cell.stats is not None
        return output_error(site.cell.dense(), round_nearest(site.cell.dense(), form).unpack(), site.cell.stats.hessian)

    plain = error()
    site.fold(awq_scale(site, form))
    assert error() < 0.9 * plain


@pytest.mark.parametrize("case", ["llama_mqa_tied_bias", "qwen2", "qwen3_moe", "gemma3_text", "phi3_longrope", "olmo2"])
def test_calibration_sees_what_the_model_computes(case: str, tmp_path: Path) -> None:
    """Windows, experts, norms anywhere: the walk over calibration text is the served model's."""
    write_tiny(case, tmp_path)
    ids = torch.arange(70).view(2, 35) * 3 + 50
    theirs = torch.cat(Rig(served(tmp_path, "reference")).logits(spans(ids)))
    assert torch.allclose(logits(observing(tmp_path), ids), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(Path(p).read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("test_l*.py"))))
    return path


def run(tmp_path: Path, text: Path | None, **settings: object) -> tuple[Path, Report]:
    """The small bundled model quantised with few short windows."""
    chosen = replace(Settings(samples=12, length=48), **settings)  # type: ignore[arg-type]
    return tmp_path / "out", calibrate(DRAFT, tmp_path / "out", text, chosen)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("w4a8", "gptq"), ("w4a8-z-g32", "awq+gptq"), ("w8a8", "smoothquant"), ("w4a16", "awq"), ("w8a16", "gptq"), ("w4a8", "rtn")],
)
def test_a_calibrated_model_runs_on_the_kernels_as_its_twin(scheme: str, method: str, text: Path, tmp_path: Path) -> None:
    out, report = run(tmp_path, text, scheme=scheme, method=method)
    assert len(report.sites) == 12 and all(0 < s.error < 0.1 for s in report.sites)
    stored = open_checkpoint(out)
    w = stored.get_weight("model.layers.0.mlp.down_proj.weight")
    assert isinstance(w, Canonical) and (w.bits, w.activations) == (4 if scheme[1] == "4" else 8, 8 if "a8" in scheme else 16)
    assert isinstance(stored.get_weight("lm_head.weight"), Canonical)
    assert stored.config["quantization_config"]["provenance"] == {"scheme": scheme, "calibrator": method, "windows": [12, 48]}
    parts = [Part(0, 0, [5, 7, 300, 9, 41]), Part(1, 0, list(range(100, 140)))]
    ours, twin, original = (
        torch.cat(Rig(model).logits(parts)) for model in (served(out, "cpu"), served(out, "reference"), served(DRAFT, "reference"))
    )
    size = twin.abs().max()
    # A value on the border between two 8-bit codes may fall to either side; the kernels take 8-bit activations for all 8-bit weights.
    slack = 1 if "a8" in scheme else 2
    assert (ours - twin).abs().max() < slack * 2e-2 * size and (ours - twin).square().mean().sqrt() < slack * 4e-3 * size
    assert torch.nn.functional.cosine_similarity(ours.flatten(), original.flatten(), 0) > 0.97


def test_compensated_layers_lose_less_in_the_end(text: Path, tmp_path: Path) -> None:
    ids = windows(read_text(text), Tokenizer.load(DRAFT), 16, 64)
    before = logits(observing(DRAFT), ids[8:])
    lost = {}
    for method in ("rtn", "gptq"):
        calibrate(DRAFT, tmp_path / method, ids[:8], Settings(method=method, head=False))
        after = torch.cat(Rig(served(tmp_path / method, "reference")).logits(spans(ids[8:])))
        lost[method] = (after - before).square().mean().item()
    assert lost["gptq"] < lost["rtn"]
    assert open_checkpoint(tmp_path / "gptq").config["tie_word_embeddings"]


def test_groups_that_do_not_fit_become_smaller_and_it_is_said(text: Path, tmp_path: Path) -> None:
    out, report = run(tmp_path, text, method="rtn", scheme="w4a8-g64")
    assert report.notes == ["linears of 96 inputs have groups of 32, since 64 does not divide them"]
    weights = [open_checkpoint(out).get_weight(f"model.layers.1.mlp.{part}_proj.weight") for part in ("up", "down")]
    assert [w.group for w in weights if isinstance(w, Canonical)] == [32, 64]
    assert fitting(Form(4, 128, True, 8), 704).group == 64 and fitting(Form(4, 128, True, 8), 256).group == 128
    assert fitting(Form(4, 64, True, 8), 100) == Form(8, 0, True, 8)
    assert form_of(Settings()).group == 128


def test_a_budget_of_bits_keeps_the_most_sensitive_linears_wide(text: Path, tmp_path: Path) -> None:
    out, report = run(tmp_path, text, method="rtn", bits=5.5)
    wide = {s.name for s in report.sites if s.form.bits == 8}
    assert 0 < len(wide) < 12 and 4.5 < report.average_bits <= 5.5
    assert any(note.startswith("in 8 bits: ") and all(name in note for name in wide) for note in report.notes)
    narrow = [s.error for s in report.sites if s.form.bits == 4]
    assert max(s.error for s in report.sites if s.form.bits == 8) < min(narrow)
    assert torch.isfinite(Rig(served(out, "cpu")).logits([Part(0, 0, [1, 2, 3])])[0]).all()
    head = open_checkpoint(run(tmp_path / "h4", text, scheme="w4a8-h4")[0]).get_weight("lm_head.weight")
    assert isinstance(head, Canonical) and head.bits == 4
    with pytest.raises(ConfigError, match=r"4\.1 bits is less than the 4"):
        calibrate(DRAFT, tmp_path / "small", text, Settings(method="rtn", bits=4.1, samples=2, length=48))


def test_experts_are_calibrated_one_by_one(tmp_path: Path) -> None:
    write_tiny("qwen3_moe", tmp_path / "moe", torch.bfloat16)
    ids = torch.randint(3, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    report = calibrate(tmp_path / "moe", tmp_path / "out", ids, Settings(scheme="w4a16-g32", method="awq+gptq", head=False))
    assert sum("experts" in s.name for s in report.sites) == 2 * 8 * 2
    stored = open_checkpoint(tmp_path / "out")
    assert isinstance(stored.get_weight("model.layers.0.mlp.experts.3.up_proj.weight"), Canonical)
    assert isinstance(stored.get_weight("model.layers.0.mlp.gate.weight"), torch.Tensor)
    ids = torch.arange(3, 40)[None]
    one, other = (Rig(served(folder, "reference")).logits(spans(ids))[0] for folder in (tmp_path / "moe", tmp_path / "out"))
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.8


def test_windows_are_spread_over_the_text(text: Path, tmp_path: Path) -> None:
    tokenizer, whole = Tokenizer.load(DRAFT), read_text(text)
    few, many = windows(whole, tokenizer, 3, 32), windows(whole, tokenizer, 10_000, 32)
    assert few.shape == (3, 32) and torch.equal(few, windows(whole, tokenizer, 3, 32))
    assert few[0].tolist() == tokenizer.encode(whole.documents[0])[:32]
    assert torch.equal(many.flatten(), torch.tensor(tokenizer.encode(whole.documents[0]))[: many.numel()])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n\n' + json.dumps({"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "3"}]}))
    assert read_text(rows).documents == ["one\n", "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n\n"]


def test_bad_input_is_refused(text: Path, tmp_path: Path) -> None:
    empty, broken, short = tmp_path / "empty.txt", tmp_path / "broken.jsonl", tmp_path / "short.txt"
    empty.write_text(" \n")
    broken.write_text('{"text": "fine"}\n[1]\n')
    short.write_text("too short")
    for wrong, file, match in (
        ({"scheme": "w5a8"}, text, "unknown quantization 'w5a8'"),
        ({"scheme": "bf16x12"}, text, "nothing to calibrate"),
        ({"method": "magic"}, text, "unknown method 'magic'; known: rtn, gptq"),
        ({"samples": 0}, text, "positive"),
        ({"alpha": 1.5}, text, "alpha is between"),
        ({"length": 5000, "samples": 1}, text, "longer than the model's 2048"),
        ({}, None, "method gptq needs calibration text"),
        ({"method": "rtn", "bits": 6.0}, None, "a budget of bits needs calibration text"),
        ({}, tmp_path / "none.txt", "none.txt cannot be read"),
        ({}, empty, "is empty"),
        ({}, broken, "line 2: no JSON object"),
        ({}, short, "less than one window of 48"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(tmp_path, file, **wrong)
    assert not (tmp_path / "out").exists()
    run(tmp_path, None, method="rtn", scheme="w8a8")
    with pytest.raises(CheckpointError, match="has a checkpoint already"):
        run(tmp_path, None, method="rtn")
    with pytest.raises(CheckpointError, match="quantised already"):
        calibrate(tmp_path / "out", tmp_path / "again", None, Settings(method="rtn"))
    write_tiny("gpt2", tmp_path / "gpt2")
    with pytest.raises(UnsupportedModel, match="gpt2"):
        calibrate(tmp_path / "gpt2", tmp_path / "again", None, Settings(method="rtn"))
    assert not (tmp_path / "again" / "config.json").exists()


def test_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = bundled_path(DRAFT), ["--calibrate", str(text), "--samples", "12", "--length", "48"]
    with pytest.raises(SystemExit) as done:
        main(["quantize", str(folder), "--scheme", "w4a8-g64", "--method", "gptq", "--output", str(tmp_path / "out"), *words])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "12 linears, 4." in said and "groups of 32, since 64 does not divide them" in said and "output error" in said
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(SystemExit) as done:
        main(["quantize", str(folder), "--scheme", "w3a8", "-o", str(tmp_path / "other"), *words])
    assert done.value.code == 1 and "[invalid_config]" in capsys.readouterr().err
