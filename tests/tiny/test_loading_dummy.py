"""Dummy weights have the names and shapes of the real checkpoint and never change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.models.loading import open_checkpoint
from presage.models.loading.shapes import FUSED, PLAIN, SPARSE, weight_shapes

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
}


@pytest.mark.parametrize("kind", sorted(PLAIN | SPARSE | FUSED))
def test_shapes_equal_what_transformers_saves(tmp_path: Path, kind: str) -> None:
    for tied in (True, False):
        config = transformers.AutoConfig.for_model(kind, **SMALL, **EXTRA.get(kind, {}), tie_word_embeddings=tied)
        out = tmp_path / str(tied)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out)
        real = open_checkpoint(out)
        dummy = open_checkpoint(out, load_format="dummy")
        assert {n: dummy.shape(n) for n in dummy.names()} == {n: real.shape(n) for n in real.names()}
        assert dummy.nbytes == real.nbytes


def test_architectures_without_a_table_ask_transformers() -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert set(weight_shapes(config)) == set(model.state_dict())
    with pytest.raises(UnsupportedModel, match="no_such_family"):
        weight_shapes({"model_type": "no_such_family"})


def write(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, "torch_dtype": "bfloat16", **changes}))
    return tmp_path


def test_values_are_normal_deterministic_and_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, vocab_size=40_000)
    first, second = open_checkpoint(path, load_format="dummy"), open_checkpoint(path, load_format="dummy")
    for name, tensor in first.items():
        assert torch.equal(tensor, second.get(name))
        assert tensor.dtype == torch.bfloat16
    # 2.5 million values: more than the repeated block.
    table = first.get("model.embed_tokens.weight").float()
    assert table.std() == pytest.approx(0.02, rel=0.02)
    assert abs(table.mean()) < 1e-4
    assert len({tuple(row.tolist()) for row in table[::500]}) == len(table[::500])
    q = [first.get(f"model.layers.{i}.self_attn.q_proj.weight") for i in range(2)]
    assert not torch.equal(q[0], q[1])
    assert torch.equal(first.get("model.norm.weight"), torch.ones(64, dtype=torch.bfloat16))


def test_dtype_and_errors(tmp_path: Path) -> None:
    path = write(tmp_path, torch_dtype="float32")
    assert open_checkpoint(path, load_format="dummy").get("model.norm.weight").dtype == torch.float32
    with pytest.raises(CheckpointError, match="no weights found"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="nearest"):
        open_checkpoint(path, load_format="dummy").get("model.normal.weight")
