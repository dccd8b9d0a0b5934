"""compressed-tensors to Canonical, judged by the package that defines the format."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.compressors import pack_to_int32 as their_pack
from compressed_tensors.compressors import unpack_from_int32 as their_unpack
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given, settings

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.quantize.canonical import Canonical
from presage.quantize.formats.compressed_tensors import CompressedTensors
from presage.quantize.formats.parts import Parts
from presage.quantize.formats.targets import targeted
from presage.quantize.formats.words import counted, pack_words, signed, unpack_words
from tests.tiny.quantised_files import Tensors

MODULE = "model.layers.0.self_attn.q_proj"
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
COMPRESSORS = {"pack-quantized": PackedQuantizationCompressor, "int-quantized": IntQuantizationCompressor}


def config(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, **more,
    }  # fmt: skip


def scheme_of(given_config: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme.model_validate(given_config["config_groups"]["group_0"])


def read(given_config: dict[str, Any], tensors: dict[str, torch.Tensor], module: str = MODULE) -> Canonical:
    raw = Tensors({f"{module}.{suffix}": t for suffix, t in tensors.items()})
    form, parts = CompressedTensors(given_config), Parts(raw, module, frozenset(raw.names()))
    weight = form.read(parts)
    assert form.shape(parts) == weight.shape
    return weight


def compressed(given_config: dict[str, Any], n: int, k: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random weights as the package stores them, and what it says they mean."""
    scheme, gen = scheme_of(given_config), torch.Generator().manual_seed(seed)
    w = scheme.weights
    assert w is not None
    half = 1 << w.num_bits - 1
    shape = {"group": (n, k // (w.group_size or 1)), "channel": (n, 1), "tensor": (1,)}[str(w.strategy)]
    scale = torch.rand(shape, generator=gen) * 0.02 + 0.01
    # Weights run over the whole range of codes and beyond it.
    state = {"weight": torch.randn(n, k, generator=gen) * 0.01 * half, "weight_scale": scale}
    if not w.symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, shape, generator=gen, dtype=torch.int8)
    compressor = COMPRESSORS[given_config["format"]]
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


@settings(deadline=None, max_examples=80)
@given(
    form=st.sampled_from(sorted(COMPRESSORS)), bits=st.sampled_from([4, 8]), strategy=st.sampled_from(["group", "channel", "tensor"]),
    symmetric=st.booleans(), dynamic=st.booleans(), n=st.integers(1, 37), groups=st.integers(1, 5), group=st.integers(1, 37),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_meaning_equals_the_packages(
    form: str, bits: int, strategy: str, symmetric: bool, dynamic: bool, n: int, groups: int, group: int, seed: int
) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    c = config(form, weights | ({"group_size": group} if strategy == "group" else {}), TOKEN if dynamic else None)
    if form == "pack-quantized" and strategy == "tensor" and not symmetric:
        return  # the package cannot read back what it writes here: it packs no zero point for a tensor but unpacks one
    if form == "pack-quantized" and not symmetric:
        n += 8  # the package cannot read zero points that take one word only
    stored, meaning = compressed(c, n, group * groups, seed)
    weight = read(c, stored)
    assert torch.equal(weight.unpack(), meaning)
    assert weight.shape == (n, group * groups)
    assert (weight.bits, weight.activations) == (bits, 8 if dynamic else 16)
    assert weight.group == (group if strategy == "group" else group * groups)
    assert (weight.zero is None) == symmetric
    assert weight.codes.dtype == (torch.int8 if symmetric else torch.uint8)


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_words_equal_the_packages_both_ways(bits: int, rows: int, count: int, seed: int) -> None:
    half, gen = 1 << bits - 1, torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, count), dtype=torch.int8, generator=gen)
    words = pack_words(counted(codes, bits), bits)
    assert torch.equal(words, their_pack(codes, bits))
    assert torch.equal(signed(unpack_words(words, bits, count), bits), codes)
    assert torch.equal(their_unpack(words, bits, codes.shape), codes)
    down = their_pack(codes, bits, packed_dim=0)
    assert torch.equal(signed(unpack_words(down.T, bits, rows), bits).T, codes)


NAMES = ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate", "model.layers.10.mlp.down_proj"]
TARGETS = ["Linear", "Embedding", "lm_head", "re:.*mlp.*", "re:.*", "re:model.layers.1.*", "q_proj", "re:q_proj", "model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("name", NAMES)
def test_targets_match_as_in_the_package(name: str) -> None:
    module = torch.nn.Embedding(2, 2) if "embed" in name else torch.nn.Linear(2, 2)
    for target in TARGETS:
        assert (targeted(name, [target]) is not None) == is_match(name, module, target), target
    theirs = match_targets(name, module, TARGETS)
    ours = targeted(name, TARGETS)
    assert (ours is None) == (not theirs)
    if ours is not None:
        # Among several patterns any may come first; a name goes before patterns and those before classes.
        assert (ours.startswith("re:"), ours in ("Linear", "Embedding")) == (theirs[0].startswith("re:"), theirs[0] in ("Linear", "Embedding"))


GROUPED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def test_each_module_has_its_own_group_and_format() -> None:
    c = config("mixed-precision", GROUPED)
    c["config_groups"]["group_0"]["format"] = "pack-quantized"
    eight = {"targets": ["re:.*down_proj"], "weights": CHANNEL, "input_activations": TOKEN, "format": "int-quantized"}
    c["config_groups"]["group_1"] = eight
    four, _ = compressed(config("pack-quantized", GROUPED), 8, 64)
    whole, meaning = compressed(config("int-quantized", CHANNEL, TOKEN), 8, 64)
    assert read(c, four).bits == 4
    down = read(c, whole, "model.layers.3.mlp.down_proj")
    assert (down.bits, down.activations) == (8, 8)
    assert torch.equal(down.unpack(), meaning)


def test_strategies_left_out_are_inferred() -> None:
    stored, meaning = compressed(config("pack-quantized", GROUPED), 8, 64)
    bare = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
    assert torch.equal(read(config("pack-quantized", bare), stored).unpack(), meaning)
    stored, meaning = compressed(config("int-quantized", CHANNEL), 8, 64)
    assert torch.equal(read(config("int-quantized", CHANNEL | {"strategy": None, "group_size": -1}), stored).unpack(), meaning)


def test_groups_mixed_by_act_order_of_older_versions() -> None:
    """weight_g_idx: input k has the scale of group g_idx[k] (one element after the other here)."""
    c = config("pack-quantized", GROUPED | {"actorder": "group", "symmetric": False})
    stored, _ = compressed(config("pack-quantized", GROUPED | {"symmetric": False}), 16, 96)
    g_idx = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    weight = read(c, stored | {"weight_g_idx": g_idx.int()})
    codes = their_unpack(stored["weight_packed"], 4, torch.Size((16, 96)))
    zeros = their_unpack(stored["weight_zero_point"], 4, torch.Size((16, 3)), packed_dim=0)
    meaning = weight.unpack()
    for n in range(16):
        for k in range(96):
            g = int(g_idx[k])
            assert meaning[n, k] == stored["weight_scale"][n, g] * (int(codes[n, k]) - int(zeros[n, g]))
    in_order = torch.arange(96, dtype=torch.int32) // 32
    assert read(c, stored | {"weight_g_idx": in_order}).perm is None
    assert read(c, stored | {"weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}).perm is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config("float-quantized", GROUPED), "format 'float-quantized'"),
        (config("nvfp4-pack-quantized", GROUPED), "format 'nvfp4-pack-quantized'"),
        (config("marlin-24", GROUPED), "format 'marlin-24'"),
        (config("pack-quantized", GROUPED | {"num_bits": 3}), "weights of 3-bit int"),
        (config("pack-quantized", GROUPED | {"num_bits": 2}), "weights of 2-bit int"),
        (config("int-quantized", CHANNEL | {"type": "float"}), "weights of 8-bit float"),
        (config("int-quantized", CHANNEL | {"strategy": "block"}), "weight strategy 'block'"),
        (config("pack-quantized", GROUPED | {"group_size": None}), "weight strategy 'group' with group_size None"),
        (config("int-quantized", CHANNEL | {"dynamic": True}), "dynamically quantised weights"),
        (config("int-quantized", CHANNEL, TOKEN | {"dynamic": False, "strategy": "tensor"}), "static symmetric 8-bit int input activations per t"),
        (config("int-quantized", CHANNEL, TOKEN | {"strategy": "tensor"}), "dynamic symmetric 8-bit int input activations per tensor"),
        (config("int-quantized", CHANNEL, TOKEN | {"symmetric": False}), "dynamic asymmetric"),
        (config("pack-quantized", GROUPED, TOKEN | {"type": "float"}), "8-bit float input activations"),
        (config("pack-quantized", GROUPED, TOKEN | {"num_bits": 4}), "4-bit int input activations"),
        (config("pack-quantized", GROUPED, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity sparse-24-bitmask"),
        (config("pack-quantized", GROUPED, transform_config={"config_groups": {"R1": {}}}), "transforms"),
        (config("pack-quantized", GROUPED, kv_cache_scheme=TOKEN), "kv_cache_scheme"),
        (config("pack-quantized", GROUPED, quantization_status="frozen"), "quantization_status 'frozen'"),
        (config("pack-quantized", GROUPED, config_groups={"W4A16": ["Linear"]}), "the preset 'W4A16'"),
        (config("pack-quantized", GROUPED, config_groups={}), "without config_groups"),
        (config("pack-quantized", {}), "a config group without weights"),
    ],
)  # fmt: skip
def test_refusals_name_the_scheme_and_what_is_supported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"compressed-tensors: .*{message}.* is not supported; supported: .*int8 per token"):
        CompressedTensors(change)


def test_empty_extras_are_no_refusal() -> None:
    CompressedTensors(config("pack-quantized", GROUPED, sparsity_config={}, transform_config={}, kv_cache_scheme=None))


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_packed", None, "weight_packed is missing"),
        ("weight_zero_point", None, "weight_zero_point is missing"),
        ("weight_shape", None, "weight_shape is missing"),
        ("weight_scale", torch.ones(16, 1), r"weight_scale has shape \[16, 1\], expected \[16, 2\]"),
        ("weight_packed", torch.ones(16, 7, dtype=torch.int32), r"weight_packed has shape \[16, 7\], expected \[16, 8\]"),
        ("weight_zero_point", torch.ones(1, 2, dtype=torch.int32), r"weight_zero_point has shape \[1, 2\], expected \[2, 2\]"),
        ("weight_scale", torch.full((16, 2), float("inf")), "not finite"),
    ],
)
def test_damaged_tensors_are_named(suffix: str, value: torch.Tensor | None, message: str) -> None:
    c = config("pack-quantized", GROUPED | {"symmetric": False})
    stored: dict[str, Any] = compressed(c, 16, 64)[0] | {suffix: value}
    with pytest.raises(CheckpointError, match=f"{MODULE}.*{message}"):
        read(c, {s: t for s, t in stored.items() if t is not None})


def test_a_rest_of_inputs_and_codes_beyond_their_bits() -> None:
    stored, _ = compressed(config("pack-quantized", GROUPED), 8, 64)
    with pytest.raises(UnsupportedModel, match=r"64 inputs are no multiple of the group size 48"):
        read(config("pack-quantized", GROUPED | {"group_size": 48}), stored)
    stored, _ = compressed(config("int-quantized", CHANNEL), 8, 64)
    with pytest.raises(CheckpointError, match="weight has codes beyond 4 bits"):
        read(config("int-quantized", CHANNEL | {"num_bits": 4}), stored)


def test_modules_that_the_config_does_not_mean() -> None:
    stored, _ = compressed(config("pack-quantized", GROUPED), 8, 64)
    for module in ("lm_head", "model.embed_tokens"):
        with pytest.raises(CheckpointError, match=f"{module} has quantised tensors, but quantization_config does not target it"):
            read(config("pack-quantized", GROUPED), stored, module)
    with pytest.raises(CheckpointError, match="is no regular expression"):
        read(config("pack-quantized", GROUPED, ignore=["re:("]), stored)
