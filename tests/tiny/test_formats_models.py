"""A model in every format equals its dequantised twin: in transformers on the meaning of the packed tensors, and in our own kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.layers.ops import build_ops
from presage.models.base import Model
from presage.models.loading import open_checkpoint
from presage.models.loading.checkpoint import Checkpoint
from presage.models.registry import build_model
from presage.quantize.canonical import Canonical
from presage.quantize.formats.compressed_tensors_writer import write_checkpoint
from tests.tiny.families import small_config
from tests.tiny.families import write_checkpoint as write_tiny
from tests.tiny.plans import Part
from tests.tiny.quantised_files import FORMS, awq_tensors, gptq_tensors, linears, quantise, random_blocks, rewrite
from tests.tiny.rig import Rig
from tests.tiny.to_gguf import gguf_name, laid_out, write_meta

IDS = [1, 5, 17, 100, 3, 44, 2, 9, 63, 120, 7, 7, 8]
Packed = Iterator[tuple[str, torch.Tensor, torch.Tensor]]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": (GPTQ, {"group": 32, "bits": 4, "symmetric": True}),
    "gptq act-order": (GPTQ | {"desc_act": True, "sym": False}, {"group": 32, "bits": 4, "shuffled": True}),
    "gptq 8 bits": (GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, {"group": 32, "bits": 8, "symmetric": True}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, {"group": 32, "bits": 4}),
}


def packer(method: str) -> Callable[[torch.Tensor], Packed]:
    config, how = METHODS[method]

    def pack(w: torch.Tensor) -> Packed:
        made = quantise(w, **how)
        tensors = awq_tensors(made) if method == "awq" else gptq_tensors(made, config.get("checkpoint_format") != "gptq_v2")
        meaning = made.dense()
        yield from ((suffix, t, meaning) for suffix, t in tensors.items())

    return pack


def packed_folder(case: str, method: str, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random checkpoint of a case, packed; and what each of its tensors means."""
    write_tiny(case, path / "dense")
    return path / method, rewrite(path / "dense", path / method, METHODS[method][0], packer(method))


class Twin:
    """A checkpoint's dequantised twin."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        self.names, self._inner = checkpoint.names, checkpoint

    def get(self, name: str) -> torch.Tensor:
        return self._inner.get(name)


def built(checkpoint: Any, kernels: Any = "reference", dtype: torch.dtype = torch.float32) -> Model:
    return build_model(checkpoint, dtype, build_ops(kernels, dtype, 1), max_len=256)


def logits(model: Model) -> torch.Tensor:
    return Rig(model).logits([Part(0, 0, IDS)])[0]


def theirs(folder: Path, meaning: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of transformers on the meaning of every tensor, loaded the way it loads a file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    for name, tensor in meaning.items():
        if name in state:
            state[name].copy_(tensor)
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), 0))


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_llama_equals_transformers_on_its_meaning(method: str, tmp_path: Path) -> None:
    folder, meaning = packed_folder("llama", method, tmp_path)
    checkpoint = open_checkpoint(folder)
    ours = logits(built(checkpoint))
    assert float((ours - theirs(tmp_path / "dense", meaning)).abs().max()) < 1e-4
    assert float((ours - logits(built(Twin(checkpoint)))).abs().max()) < 1e-5
    assert alike(ours, theirs(tmp_path / "dense", {})) > 0.9, "quantised beyond recognition: the comparison says little"


@pytest.mark.parametrize(("case", "method"), [("phi3", "gptq"), ("phi3", "awq"), ("qwen2", "gptq act-order"), ("qwen3", "awq")])
def test_fused_matrices_biases_and_norms(case: str, method: str, tmp_path: Path) -> None:
    folder, meaning = packed_folder(case, method, tmp_path)
    ours = logits(built(open_checkpoint(folder)))
    assert float((ours - theirs(tmp_path / "dense", meaning)).abs().max()) < 1e-4


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_quantised_experts(case: str, tmp_path: Path) -> None:
    """transformers keeps experts stacked, so the twin is ours; dense models of these families are compared with it elsewhere."""
    folder, _ = packed_folder(case, "awq", tmp_path)
    checkpoint = open_checkpoint(folder)
    expert = next(n for n in checkpoint.names() if ".experts.1." in n)
    assert isinstance(checkpoint.get_weight(expert), Canonical)
    assert float((logits(built(checkpoint)) - logits(built(Twin(checkpoint)))).abs().max()) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_written_llama_equals_its_twin(form: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    folder = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS[form]))
    checkpoint = open_checkpoint(folder)
    ours, twin = logits(built(checkpoint)), logits(built(Twin(checkpoint)))
    if FORMS[form]["activations"] == 16:
        assert float((ours - twin).abs().max()) < 1e-5
        return
    # Inputs are rounded to 8 bits here, by transformers as well (with a slightly other scale), and not in the twin.
    assert 0.999 < alike(ours, twin) < 1.0
    if FORMS[form]["symmetric"]:
        with torch.inference_mode():
            rounded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
        assert alike(ours, rounded) > 0.999


def test_kernels_run_packed_models(tmp_path: Path) -> None:
    folder, _ = packed_folder("llama", "gptq", tmp_path)
    checkpoint = open_checkpoint(folder)
    ours, twin = logits(built(checkpoint, "cpu", torch.bfloat16)), logits(built(Twin(checkpoint)))
    assert alike(ours, twin) > 0.995


def written(folder: Path, form: dict[str, Any]) -> Path:
    write_tiny("llama_head_24", folder / "dense")
    source = open_checkpoint(folder / "dense")
    return write_checkpoint(folder / "out", source, linears(source, **form))


def test_heads_that_are_widened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path, FORMS["w8a16"]))
    assert float((logits(built(checkpoint)) - logits(built(Twin(checkpoint)))).abs().max()) < 1e-5
    grouped = open_checkpoint(written(tmp_path / "grouped", FORMS["w4a16"]))
    with pytest.raises(UnsupportedModel, match=r"o_proj\.weight: heads of 24 with weights quantised in groups"):
        built(grouped)


def test_matrices_that_are_stored_transposed_are_refused(tmp_path: Path) -> None:
    write_tiny("gpt2", tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    name = next(n for n in source.names() if n.endswith("h.0.mlp.c_fc.weight"))
    w = source.get(name)
    codes = torch.zeros(w.shape, dtype=torch.int8)
    folder = write_checkpoint(tmp_path / "out", source, [(name, Canonical(codes, 8, torch.ones(w.shape[0], 1), w.shape[1], activations=8))])
    with pytest.raises(UnsupportedModel, match="quantised gpt2"):
        built(open_checkpoint(folder))


def test_a_quantised_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder, _ = packed_folder("llama", "awq", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight has shape \[96, 64\]; the configuration says \[128, 64\]"):
        built(open_checkpoint(folder))


def test_codes_without_their_scales_are_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    folder = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS["w8a8"]))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale is missing"):
        built(open_checkpoint(folder))


def gguf_model(path: Path, kinds: Callable[[str], str], tied: bool) -> Path:
    """A llama of one layer whose matrices are blocks of the given kinds: random bytes where the package has no encoder."""
    config = small_config("llama")
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64, "vocab_size": 200, "initializer_range": 0.05}
    for key, value in {**wide, "tie_word_embeddings": tied}.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, "llama")
    write_meta(writer, config)
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and tied:
            continue
        kind = kinds(name) if tensor.dim() == 2 else "F32"
        data = laid_out("llama", name, tensor.float().numpy(), config)
        if kind in ("Q4_K", "Q6_K"):
            # Scales so small that the model's logits stay finite and not saturated.
            data = random_blocks(kind, data.shape[0], data.shape[1] // 256, seed, 0.0005)
        elif kind != "F32":
            data = gguf.quants.quantize(data, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(gguf_name("llama", name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MIXES: dict[str, Callable[[str], str]] = {
    "Q4_0": lambda name: "Q4_0",
    "Q8_0": lambda name: "Q8_0",
    "Q4_K_M": lambda name: "Q6_K" if any(part in name for part in ("v_proj", "down_proj", "embed", "lm_head")) else "Q4_K",
    "Q5_0": lambda name: "Q5_0",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_a_gguf_model_equals_its_twin(mix: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf_model(tmp_path / "m.gguf", MIXES[mix], tied))
    quantised = {n for n in checkpoint.names() if isinstance(checkpoint.get_weight(n), Canonical)}
    assert len(quantised) == (0 if mix == "Q5_0" else 8 + (not tied))
    ours, twin = logits(built(checkpoint)), logits(built(Twin(checkpoint)))
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({n: t.float() for n, t in checkpoint.items()}, strict=False)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    assert float((twin - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    # The quantised types run with rows in int8, as other engines run them, so only the dequantised twin is exact.
    assert float(torch.nn.functional.cosine_similarity(ours, twin, -1).min()) > (0.98 if quantised else 0.999999)
