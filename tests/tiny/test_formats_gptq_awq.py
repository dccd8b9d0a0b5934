"""GPTQ and AWQ files to Canonical: against slow packers written from the formats' description, and against their packages if installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.models.loading import open_checkpoint
from presage.quantize.canonical import Canonical
from presage.quantize.formats.awq import AWQ
from presage.quantize.formats.gptq import GPTQ
from presage.quantize.formats.parts import Format, Parts
from tests.tiny.quantised_files import Codes, Tensors, awq_tensors, gptq_tensors, random_codes

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def read(form: Format, tensors: dict[str, torch.Tensor], module: str = "a.b") -> Canonical:
    raw = Tensors({f"{module}.{suffix}": t for suffix, t in tensors.items()})
    parts = Parts(raw, module, frozenset(raw.names()))
    weight = form.read(parts)
    assert form.shape(parts) == weight.shape
    return weight


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]), octets=st.integers(1, 5), groups=st.integers(1, 3), group=st.sampled_from([8, 16, 24, 32]),
    symmetric=st.booleans(), shuffled=st.booleans(), v2=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_gptq_means_what_was_packed(
    bits: int, octets: int, groups: int, group: int, symmetric: bool, shuffled: bool, v2: bool, seed: int
) -> None:
    made = random_codes(8 * octets, group * groups, group, bits, symmetric, shuffled, seed)
    config = GPTQ_CONFIG | {"bits": bits, "group_size": group, "sym": symmetric} | ({"checkpoint_format": "gptq_v2"} if v2 else {})
    weight = read(GPTQ(config), gptq_tensors(made, minus_one=not v2))
    assert torch.equal(weight.unpack(), made.dense())
    assert (weight.bits, weight.group, weight.activations) == (bits, group, 16)
    assert weight.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert (weight.zero is None) == symmetric
    in_order = np.array_equal(made.g_idx, np.arange(group * groups) // group)
    assert (weight.perm is None) == in_order


def test_gptq_without_groups_and_without_order() -> None:
    made = random_codes(16, 96, 96, 4)
    tensors = gptq_tensors(made)
    for size in (-1, 96, 128):
        weight = read(GPTQ(GPTQ_CONFIG | {"group_size": size}), tensors)
        assert weight.group == 96
        assert torch.equal(weight.unpack(), made.dense())
    del tensors["g_idx"]
    assert torch.equal(read(GPTQ(GPTQ_CONFIG | {"group_size": -1}), tensors).unpack(), made.dense())


def test_gptq_version_one_wraps_a_zero_point_of_zero() -> None:
    """Stored as zero minus one, a zero point of 0 is the largest code; reading must mask after adding."""
    made = random_codes(8, 32, 32, 4)
    made.zeros[:] = 0
    tensors = gptq_tensors(made)
    assert int(tensors["qzeros"][0, 0]) == -1
    weight = read(GPTQ(GPTQ_CONFIG), tensors)
    assert weight.zero is not None and not weight.zero.any()


def test_a_symmetric_config_with_other_zero_points_keeps_them() -> None:
    made = random_codes(8, 32, 32, 4, symmetric=False)
    weight = read(GPTQ(GPTQ_CONFIG | {"sym": True}), gptq_tensors(made))
    assert weight.zero is not None
    assert torch.equal(weight.unpack(), made.dense())


@settings(deadline=None, max_examples=25)
@given(octets=st.integers(1, 5), groups=st.integers(1, 3), group=st.sampled_from([1, 7, 32]), seed=st.integers(0, 99))
def test_awq_means_what_was_packed(octets: int, groups: int, group: int, seed: int) -> None:
    made = random_codes(8 * octets, group * groups, group, 4, seed=seed)
    weight = read(AWQ(AWQ_CONFIG | {"group_size": group}), awq_tensors(made))
    assert torch.equal(weight.unpack(), made.dense())
    assert (weight.bits, weight.group, weight.codes.dtype, weight.activations) == (4, group, torch.uint8, 16)


def test_old_awq_keys_and_one_group() -> None:
    made = random_codes(16, 40, 40, 4)
    weight = read(AWQ({"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"}), awq_tensors(made))
    assert torch.equal(weight.unpack(), made.dense())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "gptq: 3 bits"),
        ({"bits": 2}, "gptq: 2 bits"),
        ({"checkpoint_format": "marlin"}, "gptq: checkpoint format 'marlin'"),
        ({"is_marlin_format": True}, "gptq: checkpoint format 'marlin'"),
        ({"pack_dtype": "int16"}, "gptq: packing into int16"),
        ({"dynamic": {r"+:.*\.18\..*": {"bits": 8}}}, r"gptq: another bits for modules '\+:"),
    ],
)
def test_gptq_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message + ".*supported: compressed-tensors.*gptq.*awq"):
        GPTQ(GPTQ_CONFIG | change)


def test_gptq_modules_left_dense_are_no_refusal() -> None:
    GPTQ(GPTQ_CONFIG | {"dynamic": {r"-:lm_head": {}, r"-:.*mlp\.gate.*": {"bits": 8}}})


@pytest.mark.parametrize(("change", "message"), [({"bits": 8}, "awq: 8 bits"), ({"version": "gemv"}, "awq: version 'gemv'")])
def test_awq_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        AWQ(AWQ_CONFIG | change)


def test_a_rest_of_inputs_is_refused() -> None:
    made = random_codes(8, 64, 32, 4)
    with pytest.raises(UnsupportedModel, match=r"a\.b: 64 inputs are no multiple of the group size 48"):
        read(GPTQ(GPTQ_CONFIG | {"group_size": 48}), gptq_tensors(made))


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("scales", None, r"a\.b\.scales is missing"),
        ("qweight", None, r"a\.b\.qweight is missing"),
        ("scales", torch.ones(2, 8, dtype=torch.float16), r"a\.b\.scales has shape \[2, 8\], expected \[1, 8\]"),
        ("scales", torch.full((1, 8), float("nan")), r"a\.b\.scales has scales that are not finite"),
        ("qzeros", torch.ones(1, 2, dtype=torch.int32), r"a\.b\.qzeros has shape \[1, 2\], expected \[1, 1\]"),
        ("g_idx", torch.ones(32, dtype=torch.int32), r"a\.b\.g_idx does not name 1 groups of 32 inputs each"),
        ("g_idx", torch.full((32,), -2, dtype=torch.int32), r"a\.b\.g_idx does not name 1 groups"),
        ("qweight", torch.ones(4, dtype=torch.int32), r"a\.b\.qweight has shape \[4\], expected a matrix"),
    ],
)
def test_damaged_tensors_are_named(suffix: str, value: torch.Tensor | None, message: str) -> None:
    tensors: dict[str, Any] = gptq_tensors(random_codes(8, 32, 32, 4)) | {suffix: value}
    with pytest.raises(CheckpointError, match=message):
        read(GPTQ(GPTQ_CONFIG), {s: t for s, t in tensors.items() if t is not None})


def folder(path: Path, tensors: dict[str, torch.Tensor], config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return path


def test_a_folder_presents_weights_by_their_usual_names(tmp_path: Path) -> None:
    made = random_codes(16, 64, 32, 4)
    packed = {f"model.layers.0.mlp.up_proj.{s}": t for s, t in gptq_tensors(made).items()}
    plain = {"model.norm.weight": torch.ones(64), "model.layers.0.mlp.up_proj.bias": torch.ones(16, dtype=torch.float16)}
    checkpoint = open_checkpoint(folder(tmp_path / "m", packed | plain, GPTQ_CONFIG))
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.names() == ["model.layers.0.mlp.up_proj.bias", name, "model.norm.weight"]
    assert name in checkpoint and "model.layers.0.mlp.up_proj.qweight" not in checkpoint
    assert checkpoint.shape(name) == (16, 64)
    weight = checkpoint.get_weight(name)
    assert isinstance(weight, Canonical)
    assert torch.equal(checkpoint.get(name), made.dense())
    assert torch.equal(checkpoint.get_weight("model.norm.weight"), torch.ones(64))
    stored = sum(t.nbytes for t in packed.values())
    assert checkpoint.stored_bytes(name) == stored
    assert checkpoint.nbytes == stored + 64 * 4 + 16 * 2
    # In memory the codes stay as they are, the rest takes the asked type.
    assert checkpoint.weight_bytes(torch.bfloat16) == stored + 2 * (64 + 16)
    assert dict(checkpoint.items())[name].dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"nearest: model\.layers\.0\.mlp\.up_proj\.weight"):
        checkpoint.get_weight("model.layers.0.mlp.up_prj.weight")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, UnsupportedModel, "quantised by fp8: this method is not supported; supported: compressed"),
        ({"quant_method": "bitsandbytes"}, UnsupportedModel, "bitsandbytes"),
        ("gptq", CheckpointError, "quantization_config is no object"),
        (GPTQ_CONFIG | {"group_size": "many"}, CheckpointError, "quantization_config of gptq cannot be understood"),
        (GPTQ_CONFIG, CheckpointError, "no tensor is quantised"),
    ],
)
def test_configs_that_cannot_be_served(tmp_path: Path, config: Any, error: type[Exception], message: str) -> None:
    path = folder(tmp_path / "m", {"model.norm.weight": torch.ones(64)}, config)
    with pytest.raises(error, match=message):
        open_checkpoint(path)


def test_a_truncated_file_names_itself(tmp_path: Path) -> None:
    packed = {f"model.layers.0.mlp.up_proj.{s}": t for s, t in gptq_tensors(random_codes(16, 64, 32, 4)).items()}
    path = folder(tmp_path / "m", packed, GPTQ_CONFIG) / "model.safetensors"
    assert open_checkpoint(tmp_path / "m").names() == ["model.layers.0.mlp.up_proj.weight"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        open_checkpoint(tmp_path / "m")


def package_file(package: str, relative: str) -> ModuleType:
    """One file of a package that is installed without what it depends on; skips the test if it is not there."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location(f"_{package}_part", Path(found.submodule_search_locations[0]) / relative)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_autogptq_packs_the_same(bits: int, shuffled: bool) -> None:
    qlinear = package_file("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py")
    made = random_codes(32, 64, 32, bits, shuffled=shuffled)
    layer = qlinear.QuantLinear(bits, 32, 64, 32, bias=False)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = made.dense()
    zeros = torch.tensor(np.maximum(made.zeros, 1)).float()
    made = Codes(made.codes, np.maximum(made.zeros, 1), made.scales, made.g_idx, bits)
    linear.weight.data = made.dense()
    layer.pack(linear, made.scales.float(), zeros, torch.tensor(made.g_idx))
    ours = gptq_tensors(made)
    for name in ("qweight", "qzeros"):
        assert torch.equal(getattr(layer, name), ours[name]), name
    theirs = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales.half(), "g_idx": layer.g_idx.int()}
    weight = read(GPTQ(GPTQ_CONFIG | {"bits": bits}), theirs)
    assert torch.equal(weight.unpack(), made.dense())


def test_autoawq_unpacks_the_same() -> None:
    packing = package_file("awq", "utils/packing_utils.py")
    made = random_codes(32, 64, 32, 4)
    t = awq_tensors(made)
    theirs = packing.dequantize_gemm(t["qweight"], t["qzeros"], t["scales"].float(), 4, 32)
    assert torch.equal(theirs.T, read(AWQ(AWQ_CONFIG), t).unpack())
