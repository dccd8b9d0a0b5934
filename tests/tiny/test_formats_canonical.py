"""The neutral form itself: cutting, fusing and unpacking agree with each other; and what weights weigh."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from presage.core.errors import CheckpointError
from presage.models.loading import open_checkpoint
from presage.models.weights import LLAMA_NAMES, Weights
from presage.quantize.canonical import Canonical, dense, fuse
from presage.quantize.formats.compressed_tensors_writer import write_checkpoint
from tests.tiny.families import write_checkpoint as write_tiny
from tests.tiny.quantised_files import FORMS, linears, nearest


def random_weight(n: int, k: int, group: int, level: str, perm: bool, seed: int) -> Canonical:
    """``level``: plain, zero (points), two (levels of scales, as Q6_K), low (minima as well, as Q4_K)."""
    gen = torch.Generator().manual_seed(seed)

    def byte(width: int) -> torch.Tensor:
        return torch.randint(0, 16, (n, width), generator=gen, dtype=torch.uint8)

    scale, half = torch.rand(n, -(-k // group), generator=gen), max(1, group // 2)
    made = Canonical(byte(k), 4, scale, group, perm=torch.randperm(k, generator=gen) if perm else None)
    if level == "zero":
        return replace(made, zero=byte(scale.shape[1]))
    if level in ("two", "low"):
        made = replace(made, sub=byte(-(-k // half)), sub_group=half)
    return replace(made, low=byte(-(-k // half)), low_scale=torch.rand(scale.shape, generator=gen)) if level == "low" else made


def one_by_one(w: Canonical) -> torch.Tensor:
    """The formula of the class, one weight after the other."""
    out = torch.zeros(w.shape)
    for n in range(w.shape[0]):
        for j in range(w.shape[1]):
            g, s = j // w.group, j // w.sub_group if w.sub_group else 0
            value = w.codes[n, j].float() - (w.zero[n, g].float() if w.zero is not None else 0)
            value = w.scale[n, g] * (w.sub[n, s].float() if w.sub is not None else 1) * value
            if w.low is not None and w.low_scale is not None:
                value = value - w.low_scale[n, g] * w.low[n, s].float()
            out[n, j if w.perm is None else int(w.perm[j])] = value
    return out


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(2, 7), k=st.integers(1, 13), group=st.integers(1, 13), level=st.sampled_from(["plain", "zero", "two", "low"]),
    perm=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_cutting_and_fusing_keep_the_meaning(n: int, k: int, group: int, level: str, perm: bool, seed: int) -> None:
    w = random_weight(n, k, min(group, k), level, perm, seed)
    meaning = w.unpack()
    assert torch.equal(meaning, one_by_one(w))
    assert torch.equal(w.rows(1, n).unpack(), meaning[1:])
    first, second = w.chunk(2)
    assert torch.equal(torch.cat([first.unpack(), second.unpack()]), meaning[: n // 2 * 2])
    assert torch.equal(fuse([w.rows(0, 1), w.rows(1, n)]).unpack(), meaning)
    order = torch.arange(n).flip(0)
    assert torch.equal(w.by_row(lambda part: part[order]).unpack(), meaning.flip(0))
    assert torch.equal(dense(w, torch.bfloat16), meaning.bfloat16())


def test_dense_unpacks_long_tables_in_pieces_and_leaves_dense_ones_alone() -> None:
    w = random_weight(2500, 8, 4, "zero", False, 0)
    assert torch.equal(dense(w, torch.float32), w.unpack())
    table = torch.rand(3, 4)
    assert dense(table, torch.float32) is table
    assert torch.equal(dense(table.T, torch.float16), table.T.half())


def test_unlike_weights_do_not_fuse() -> None:
    w = random_weight(4, 8, 4, "plain", False, 0)
    for other in (random_weight(4, 8, 8, "plain", False, 0), random_weight(4, 8, 4, "zero", False, 0), random_weight(4, 8, 4, "plain", True, 0)):
        with pytest.raises(CheckpointError, match="quantised in different ways"):
            fuse([w, other])


def test_bytes_of_dense_checkpoints(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "f", torch.bfloat16)
    whole = open_checkpoint(tmp_path / "f")
    count = sum(t.numel() for _, t in whole.items())
    assert (whole.nbytes, whole.weight_bytes(torch.bfloat16), whole.weight_bytes(torch.float32)) == (2 * count, 2 * count, 4 * count)
    torch.save(load_file(tmp_path / "f" / "model.safetensors"), tmp_path / "f" / "pytorch_model.bin")
    (tmp_path / "f" / "model.safetensors").unlink()
    pickled = open_checkpoint(tmp_path / "f")
    assert (pickled.nbytes, pickled.weight_bytes(torch.float32)) == (2 * count, 4 * count)
    made_up = open_checkpoint(tmp_path / "f", load_format="dummy")
    assert (made_up.nbytes, made_up.weight_bytes(torch.float32)) == (2 * count, 4 * count)


def test_made_up_weights_are_dense_whatever_the_config_says(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    made_up = open_checkpoint(tmp_path, load_format="dummy")
    assert isinstance(made_up.get_weight("model.layers.0.mlp.up_proj.weight"), torch.Tensor)


def test_an_embedding_may_be_quantised_and_a_norm_may_not(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    name = "model.embed_tokens.weight"
    table = nearest(source.get(name), **FORMS["w8a16"])
    quantised: Any = [*linears(source, **FORMS["w8a16"]), (name, table)]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "out", source, quantised))
    weights = Weights(checkpoint, LLAMA_NAMES)
    found = weights.get("embed")
    assert isinstance(found, Canonical)
    assert torch.equal(dense(found, torch.float32), table.unpack())
    assert checkpoint.stored_bytes(name, torch.bfloat16) == checkpoint.stored_bytes(name) + 2 * table.codes.numel()
    assert weights.tensor("norm").dim() == 1
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is quantised, which only matrices may be"):
        weights.tensor("embed")


def test_packed_tensors_of_another_type_are_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    folder = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS["w4a16"]))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_packed has dtype float32, expected one of int32"):
        open_checkpoint(folder).get_weight("model.layers.0.mlp.up_proj.weight")
