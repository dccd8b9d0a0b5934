"""GGUF files give the tensors, the config and the logits of the checkpoint they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.models.loading import open_checkpoint
from presage.models.loading.gguf_config import _llama3_divisors
from presage.quantize.canonical import Canonical
from tests.tiny.to_gguf import write_gguf

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.tensor([[1, 5, 17, 100, 3, 44, 2, 9, 63, 120]])


def random_model(kind: str, **extra: Any) -> Any:
    torch.manual_seed(11)
    more = {"vocab_size": 128, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, **extra}
    config = transformers.AutoConfig.for_model(kind, **SMALL, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Norms and biases start at the identity, where a forgotten one would not be seen.
            p.add_(torch.randn_like(p) * 0.1)
    return model


def rebuilt(checkpoint: Any) -> Any:
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in checkpoint.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_original(tmp_path: Path, kind: str, tied: bool) -> None:
    model = random_model(kind, tie_word_embeddings=tied, **({"query_pre_attn_scalar": 16} if kind == "gemma2" else {}))
    checkpoint = open_checkpoint(write_gguf(model, tmp_path / "m.gguf"))
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert checkpoint.config["rms_norm_eps"] == model.config.rms_norm_eps
    for name, tensor in checkpoint.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=2e-7)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(checkpoint)(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_transformers_reads_the_same_file_alike(tmp_path: Path) -> None:
    """transformers has a GGUF reader of its own: it judges both the test's writer and our reader."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    write_gguf(random_model("llama", tie_word_embeddings=False), tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(theirs) == checkpoint.names()
    for name, tensor in checkpoint.items():
        assert torch.equal(tensor.float(), theirs[name]), name


@pytest.mark.parametrize(
    ("quant", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32), ("Q5_0", torch.float32)]
)
def test_quantised_tensors(tmp_path: Path, quant: str, dtype: torch.dtype) -> None:
    model = random_model("qwen2")
    checkpoint = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", quant))
    kind = gguf.GGMLQuantizationType[quant]
    for name, tensor in checkpoint.items():
        original = model.state_dict()[name]
        if original.dim() == 2:
            assert tensor.dtype == dtype
            data = gguf.quants.quantize(original.numpy(), kind)
            assert np.array_equal(tensor.float().numpy(), gguf.quants.dequantize(data, kind)), name
            assert checkpoint.stored_bytes(name) == data.nbytes
        else:
            assert torch.equal(tensor, original), name
    assert checkpoint.nbytes == sum(checkpoint.stored_bytes(name) for name in checkpoint.names())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1"])
def test_weights_stay_quantised_with_rows_in_order(tmp_path: Path, kind: str, quant: str) -> None:
    """Llama's q and k rows lie permuted in the file: codes and scales must come back in the order of the dense tensor."""
    model = random_model(kind)
    checkpoint = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", quant))
    for name in checkpoint.names():
        weight, dense = checkpoint.get_weight(name), checkpoint.get(name)
        assert isinstance(weight, Canonical) == (dense.dim() == 2), name
        assert torch.equal(weight.unpack() if isinstance(weight, Canonical) else weight, dense), name
        original = model.state_dict()[name]
        assert torch.nn.functional.cosine_similarity(dense.flatten(), original.flatten(), 0) > 0.99, name


def test_types_without_a_form_of_their_own_stay_dense(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(random_model("llama"), tmp_path / "m.gguf", "Q5_0"))
    weight = checkpoint.get_weight("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, checkpoint.get("model.layers.0.self_attn.q_proj.weight"))


def test_bytes_in_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(random_model("llama", tie_word_embeddings=True), tmp_path / "m.gguf", "Q4_0"))
    up, embed, norm = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"
    assert checkpoint.stored_bytes(up, torch.bfloat16) == 96 * 64 // 32 * 18
    # A quantised embedding is held dense for its rows, and as it is for the head that shares it.
    assert checkpoint.stored_bytes(embed, torch.bfloat16) == 128 * 64 // 32 * 18 + 128 * 64 * 2
    assert checkpoint.stored_bytes(norm, torch.bfloat16) == 64 * 2
    assert checkpoint.stored_bytes(norm) == 64 * 4


def test_llama3_scaling_is_found_again(tmp_path: Path) -> None:
    model = random_model("llama", rope_theta=500000.0)
    freqs = _llama3_divisors(500000.0, 16, 32.0, 1.0, 4.0, 8192)
    config = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", rope_freqs=freqs)).config
    expected = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert config["rope_scaling"] == {**expected, "original_max_position_embeddings": 8192}
    # The parameters mean to transformers what the divisors in the file say.
    parsed = transformers.AutoConfig.for_model(**config)
    inv, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](parsed, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(inv, plain / torch.tensor(freqs, dtype=torch.float32), rtol=1e-5, atol=0)
    with pytest.raises(UnsupportedModel, match="frequency scaling"):
        _ = open_checkpoint(write_gguf(model, tmp_path / "n.gguf", rope_freqs=freqs * 1.5)).config


def test_errors(tmp_path: Path) -> None:
    file = write_gguf(random_model("llama"), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="load_format is safetensors"):
        open_checkpoint(file, load_format="safetensors")
    with pytest.raises(CheckpointError, match=r"nearest: model\.norm\.weight"):
        open_checkpoint(file).get("model.nrm.weight")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: truncated"):
        open_checkpoint(cut)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a model at all" * 10)
    with pytest.raises(CheckpointError, match=r"junk\.gguf: truncated or not"):
        open_checkpoint(junk)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="falcon"):
        open_checkpoint(tmp_path / "f.gguf")
