"""Every family against transformers on random weights: float32 to 1e-4, bfloat16 no worse than transformers' own bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.models.params import FAMILIES, parse
from tests.tiny.families import CASES, small_config
from tests.tiny.plans import Part
from tests.tiny.rig import Rig, load, tiny

LENGTH = 70


def prompt(seed: int = 1, length: int = LENGTH) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


TWINS = ("qwen3_moe", "gemma2", "olmo2", "gpt2")
"""Cases that between them use every operation; the others differ in parameters only."""


@pytest.mark.parametrize(("case", "kernels"), [(c, "cpu") for c in CASES] + [(c, "reference") for c in TWINS])
def test_float32_logits_equal_transformers(case: str, kernels: str, tmp_path: Path) -> None:
    reference, model = tiny(case, tmp_path, kernels=kernels)
    ids = prompt()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    (ours,) = Rig(model).logits([Part(0, 0, ids)])
    assert float((ours - expected).abs().max()) < 1e-4
    assert expected.abs().max() > 1, "the random model is too flat for this comparison to mean anything"


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_error_is_at_most_half_again_that_of_transformers(case: str, tmp_path: Path) -> None:
    reference, model = tiny(case, tmp_path, torch.bfloat16)
    ids = prompt()
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids])).logits[0].float()
        exact = copy.deepcopy(reference).float()(torch.tensor([ids])).logits[0]
    (ours,) = Rig(model).logits([Part(0, 0, ids)])
    # The middle row: an expert chosen otherwise at a near tie changes a whole row, in either implementation.
    assert (ours - exact).abs().mean(1).median() <= 1.5 * (theirs - exact).abs().mean(1).median()


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def test_sharded_checkpoint_equals_one_file(tmp_path: Path) -> None:
    _, whole = tiny("qwen3", tmp_path / "whole")
    _, parts = tiny("qwen3", tmp_path / "parts", shard="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    ids = prompt()
    assert torch.equal(Rig(whole).logits([Part(0, 0, ids)])[0], Rig(parts).logits([Part(0, 0, ids)])[0])


def test_longrope_uses_the_long_table_beyond_the_trained_length() -> None:
    from presage.layers.rope import inverse_frequencies

    rope = parse(small_config("phi3_longrope").to_dict()).ropes[0]
    assert rope is not None and rope.dim == 12
    short, factor = inverse_frequencies(rope, 256)
    long, same = inverse_frequencies(rope, 1024)
    assert torch.allclose(short[1:] / long[1:], torch.tensor([2 / 1.1, 3 / 1.2, 4 / 1.3, 5 / 1.4, 6 / 1.5]))
    assert factor == same == pytest.approx((1 + torch.log(torch.tensor(4.0)) / torch.log(torch.tensor(256.0))).sqrt().item())


def test_unknown_types_and_options_are_named() -> None:
    base = small_config("llama").to_dict()
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama.*gpt2"):
        parse({**base, "model_type": "mamba"})
    with pytest.raises(UnsupportedModel, match=r"rope type 'dynamic'.*yarn"):
        parse({**base, "rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    with pytest.raises(UnsupportedModel, match=r"activation 'relu6'.*silu"):
        parse({**base, "hidden_act": "relu6"})


def test_old_and_new_spellings_of_a_config_agree() -> None:
    new = parse(small_config("llama_rope_llama3").to_dict())
    old = small_config("llama_rope_llama3").to_dict()
    rope = old.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    assert parse({**old, "rope_theta": theta, "rope_scaling": rope, "torch_dtype": "bfloat16"}).ropes == new.ropes


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    from presage.layers.ops import build_ops
    from presage.models.loading import open_checkpoint
    from presage.models.registry import build_model

    tiny("llama", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    ops = build_ops("reference", torch.float32, 1)

    class Broken:
        config = dict(checkpoint.config)
        swap: dict[str, torch.Tensor | None] = {}

        def names(self) -> list[str]:
            return [n for n in checkpoint.names() if self.swap.get(n, 0) is not None]

        def get(self, name: str) -> torch.Tensor:
            found = self.swap.get(name)
            return checkpoint.get(name) if found is None else found

    broken = Broken()
    broken.swap = {"model.layers.1.mlp.up_proj.weight": None}
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build_model(broken, torch.float32, ops)
    broken.swap = {"model.layers.0.self_attn.o_proj.weight": torch.zeros(64, 60)}
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight.*\[64, 60\]"):
        build_model(broken, torch.float32, ops)
    broken.swap = {"lm_head.weight": None}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        build_model(broken, torch.float32, ops)
    broken.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModel, match="gptq"):
        build_model(broken, torch.float32, ops)


def test_the_text_half_of_a_vision_checkpoint(tmp_path: Path) -> None:
    import transformers

    text = small_config("gemma3_text")
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    vision["patch_size"] = 14
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    reference = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    reference.save_pretrained(tmp_path)
    ids = prompt()
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids]), token_type_ids=torch.zeros(1, len(ids), dtype=torch.long)).logits[0]
    (ours,) = Rig(load(tmp_path, max_len=256)).logits([Part(0, 0, ids)])
    assert float((ours - expected).abs().max()) < 1e-4


def test_learned_positions_end_the_length() -> None:
    params = parse(small_config("gpt2").to_dict())
    assert params.limited(100).max_len == 100
    with pytest.raises(UnsupportedModel, match="256 learned positions"):
        params.limited(300)
