"""Checkpoints that we write: read back by transformers with the compressed-tensors package, and by ourselves, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from safetensors.torch import load_file

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.models.loading import open_checkpoint
from presage.models.loading.checkpoint import Checkpoint
from presage.quantize.canonical import Canonical
from presage.quantize.formats.compressed_tensors_writer import CompressedTensorsWriter, write_checkpoint
from tests.tiny.families import write_checkpoint as write_tiny
from tests.tiny.quantised_files import FORMS, linears, nearest, same


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source")
    write_tiny("llama", folder, torch.bfloat16)
    (folder / "tokenizer_config.json").write_text('{"kept": true}')
    return open_checkpoint(folder)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_reads_back_alike_here_and_elsewhere(form: str, source: Checkpoint, tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS[form]), {"name": form}, ["lm_head"])
    ours = open_checkpoint(out)
    assert ours.names() == source.names()
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    scheme = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    package = BaseCompressor.get_value_from_registry(scheme.format)
    for name, expected in linears(source, **FORMS[form]):
        weight, module = ours.get_weight(name), name.removesuffix("weight")
        assert isinstance(weight, Canonical) and same(weight, expected), name
        theirs = package.decompress({k.removeprefix(module): t for k, t in tensors.items() if k.startswith(module)}, scheme)["weight"]
        # They multiply in the scale's type; so do we here.
        assert torch.equal(theirs, weight.unpack().bfloat16()), name
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(ours.get(name), source.get(name))
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"kept": True}


@pytest.mark.parametrize("form", [f for f in FORMS if "a8 asy" not in f and "channel" not in f] + ["w8a8 asymmetric"])
def test_transformers_serves_what_is_written(form: str, source: Checkpoint, tmp_path: Path) -> None:
    """Not with packed zero points, which transformers cannot load as of compressed-tensors 0.20."""
    out = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS[form]), ignore=["lm_head"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    ids = torch.arange(20)[None] + 5
    with torch.inference_mode():
        logits = theirs(ids).logits  # the first call unpacks the weights
        original = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)(ids).logits
    assert torch.nn.functional.cosine_similarity(logits.float().flatten(), original.float().flatten(), 0) > (0.99 if "w8" in form else 0.9)
    state, ours = theirs.state_dict(), open_checkpoint(out)
    for name in ours.names():
        assert torch.equal(state[name], ours.get(name).bfloat16()), name


def test_the_configuration_says_it_in_the_packages_words(source: Checkpoint, tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS["w4a8"]), {"name": "w4a8", "calibrator": "gptq"})
    config = json.loads((out / "config.json").read_text())
    said = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = said.config_groups["group_0"]
    assert (said.format, said.ignore, scheme.targets) == ("pack-quantized", ["lm_head"], ["Linear"])
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.strategy) == (4, 32, "group")
    assert (scheme.input_activations.num_bits, scheme.input_activations.strategy, scheme.input_activations.dynamic) == (8, "token", True)
    assert config["quantization_config"]["provenance"] == {"name": "w4a8", "calibrator": "gptq"}
    assert {k: v for k, v in config.items() if k != "quantization_config"} == source.config


def test_a_head_of_its_own_and_changed_norms(source: Checkpoint, tmp_path: Path) -> None:
    def mixed() -> Iterator[tuple[str, Canonical | torch.Tensor]]:
        yield from linears(source, **FORMS["w4a8"])
        yield "lm_head.weight", nearest(source.get("lm_head.weight"), **FORMS["w8a8"])
        yield "model.norm.weight", source.get("model.norm.weight") * 2

    out = write_checkpoint(tmp_path / "out", source, mixed())
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (said["format"], said["ignore"]) == ("mixed-precision", [])
    assert [g["targets"] for g in said["config_groups"].values()] == [["Linear"], ["lm_head"]]
    ours = open_checkpoint(out)
    head = ours.get_weight("lm_head.weight")
    assert isinstance(head, Canonical) and same(head, nearest(source.get("lm_head.weight"), **FORMS["w8a8"]))
    assert torch.equal(ours.get("model.norm.weight"), source.get("model.norm.weight") * 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs(torch.tensor([[1, 2, 3]]))
    assert torch.equal(theirs.state_dict()["lm_head.weight"], head.unpack().bfloat16())


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path: Path) -> None:
    write_tiny("llama_mqa_tied_bias", tmp_path / "tied", torch.bfloat16)
    tied = open_checkpoint(tmp_path / "tied")
    embedding = tied.get("model.embed_tokens.weight")
    head = nearest(embedding, **FORMS["w8a8"])
    ours = open_checkpoint(write_checkpoint(tmp_path / "out", tied, [("lm_head.weight", head)]))
    assert tied.config["tie_word_embeddings"] and not ours.config["tie_word_embeddings"]
    weight = ours.get_weight("lm_head.weight")
    assert isinstance(weight, Canonical) and same(weight, head)
    assert torch.equal(ours.get("model.embed_tokens.weight"), embedding)
    kept = open_checkpoint(write_checkpoint(tmp_path / "kept", tied, linears(tied, **FORMS["w8a8"])))
    assert kept.config["tie_word_embeddings"] and "lm_head.weight" not in kept


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]), n=st.integers(1, 21), groups=st.integers(1, 4), group=st.integers(1, 35), symmetric=st.booleans(),
    activations=st.sampled_from([8, 16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_comes_back_as_it_was(
    bits: int, n: int, groups: int, group: int, symmetric: bool, activations: int, seed: int
) -> None:
    half, gen = 1 << bits - 1, torch.Generator().manual_seed(seed)
    low, high, dtype = (-half, half, torch.int8) if symmetric else (0, 2 * half, torch.uint8)
    codes = torch.randint(low, high, (n, group * groups), generator=gen, dtype=dtype)
    zero = None if symmetric else torch.randint(low, high, (n, groups), generator=gen, dtype=dtype)
    weight = Canonical(codes, bits, torch.rand(n, groups, generator=gen).half(), group, zero, activations=activations)
    with TemporaryDirectory() as folder:
        writer = CompressedTensorsWriter(Path(folder))
        writer.add("model.layers.0.mlp.up_proj.weight", weight)
        writer.finish({"model_type": "llama"})
        checkpoint = open_checkpoint(folder)
        back = checkpoint.get_weight("model.layers.0.mlp.up_proj.weight")
        assert isinstance(back, Canonical) and same(back, weight)
        assert torch.equal(back.unpack(), weight.unpack())
        assert checkpoint.shape("model.layers.0.mlp.up_proj.weight") == (n, group * groups)


def test_shards_hold_no_more_than_asked_for(source: Checkpoint, tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", source, linears(source, **FORMS["w8a8"]), shard_bytes=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = source.get("model.embed_tokens.weight").nbytes
    assert max(f.stat().st_size for f in files) < 30_000 + largest + 10_000
    assert not list(out.glob("*.part"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    ours = open_checkpoint(out)
    assert index["metadata"]["total_size"] == ours.nbytes
    for name, expected in linears(source, **FORMS["w8a8"]):
        weight = ours.get_weight(name)
        assert isinstance(weight, Canonical) and same(weight, expected)


def test_writing_is_a_stream(source: Checkpoint, tmp_path: Path) -> None:
    """A shard is on disk before the next weights are asked for."""
    seen = []

    def watched() -> Iterator[tuple[str, Canonical]]:
        for item in linears(source, **FORMS["w8a8"]):
            seen.append(len(list(tmp_path.glob("out/*.part"))))
            yield item

    write_checkpoint(tmp_path / "out", source, watched(), shard_bytes=1)
    assert seen == sorted(seen) and seen[-1] > 10


def test_an_interrupted_run_leaves_nothing_that_loads(source: Checkpoint, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Canonical]]:
        yield next(linears(source, **FORMS["w8a8"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", source, broken(), shard_bytes=1)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "shard-00099.part").write_bytes(b"of a longer run")
    write_checkpoint(tmp_path / "out", source, linears(source, **FORMS["w8a8"]))
    assert open_checkpoint(tmp_path / "out").names() == source.names()
    assert not list(tmp_path.glob("out/*.part"))
    with pytest.raises(CheckpointError, match="has a checkpoint already"):
        write_checkpoint(tmp_path / "out", source, linears(source, **FORMS["w8a8"]))


def test_what_the_format_has_no_place_for(source: Checkpoint, tmp_path: Path) -> None:
    name, plain = "model.layers.0.mlp.up_proj.weight", nearest(source.get("model.layers.0.mlp.up_proj.weight"), **FORMS["w4a8"])
    n, k = plain.shape
    ones = torch.ones(n, k // 16, dtype=torch.uint8)
    forms: dict[str, Canonical] = {
        "two levels of scales": Canonical(plain.codes, 4, plain.scale, 32, sub=ones, sub_group=16),
        "permuted inputs": Canonical(plain.codes, 4, plain.scale, 32, perm=torch.arange(k).flip(0)),
        "W6A16": Canonical(plain.codes, 6, plain.scale, 32),
        "without zero points": Canonical(plain.codes.view(torch.uint8), 4, plain.scale, 32),
        f"{k} inputs are no multiple of the group size 48": Canonical(plain.codes, 4, plain.scale, 48),
    }
    for i, (message, weight) in enumerate(forms.items()):
        with pytest.raises(UnsupportedModel, match=rf"model\.layers\.0\.mlp\.up_proj: .*{message}"):
            write_checkpoint(tmp_path / str(i), source, [(name, weight)])
    with pytest.raises(CheckpointError, match=r"model\.nothing is no tensor of"):
        write_checkpoint(tmp_path / "a", source, [("model.nothing", plain)])
    with pytest.raises(CheckpointError, match="came twice"):
        write_checkpoint(tmp_path / "b", source, [(name, plain), (name, plain)])
    with pytest.raises(CheckpointError, match="no tensor was quantised"):
        write_checkpoint(tmp_path / "c", source, [])
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj is quantised and to be ignored"):
        write_checkpoint(tmp_path / "d", source, [(name, plain)], ignore=["re:.*up_proj"])
