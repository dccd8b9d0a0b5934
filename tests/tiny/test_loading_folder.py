"""Hugging Face folders: the same tensors however they are stored, nothing copied, and errors that name the file."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from presage.bundled import BUNDLED, bundled_path
from presage.core.errors import CheckpointError
from presage.models.loading import open_checkpoint, stderr_progress

TENSORS = {f"model.layers.{i}.mlp.up_proj.weight": torch.arange(12, dtype=torch.float32).view(3, 4) + i for i in range(4)}


def folder(tmp_path: Path, name: str) -> Path:
    """A folder with config.json and no weights yet."""
    out = tmp_path / name
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return out


def sharded(tmp_path: Path, suffix: str) -> Path:
    out = folder(tmp_path, f"shards_{suffix}")
    stem, names = ("model" if suffix == "safetensors" else "pytorch_model"), list(TENSORS)
    weight_map = {}
    for n, part in enumerate((names[:1], names[1:]), 1):
        file = f"{stem}-{n:05}-of-00002.{suffix}"
        tensors = {k: TENSORS[k].clone() for k in part}
        save_file(tensors, out / file) if suffix == "safetensors" else torch.save(tensors, out / file)
        weight_map.update(dict.fromkeys(part, file))
    (out / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def single(tmp_path: Path, suffix: str) -> Path:
    out = folder(tmp_path, f"single_{suffix}")
    tensors = {k: v.clone() for k, v in TENSORS.items()}
    save_file(tensors, out / "model.safetensors") if suffix == "safetensors" else torch.save(tensors, out / "pytorch_model.bin")
    return out


@pytest.mark.parametrize("make", [single, sharded])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_layout_gives_the_same_tensors(tmp_path: Path, make: object, suffix: str) -> None:
    checkpoint = open_checkpoint(make(tmp_path, suffix))  # type: ignore[operator]
    assert checkpoint.names() == sorted(TENSORS)
    assert checkpoint.nbytes == sum(t.nbytes for t in TENSORS.values())
    assert checkpoint.generation_config == {}
    calls: list[tuple[int, int]] = []
    for name, tensor in checkpoint.items(lambda done, total: calls.append((done, total))):
        assert torch.equal(tensor, TENSORS[name])
        assert checkpoint.shape(name) == (3, 4)
    assert [done for done, _ in calls] == [48, 96, 144, 192]
    assert {total for _, total in calls} == {192}


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    """A 64 MB file costs no resident memory until its bytes are touched."""
    out = folder(tmp_path, "big")
    save_file({"w": torch.zeros(1 << 24), "v": torch.ones(4)}, out / "model.safetensors")
    checkpoint = open_checkpoint(out)
    before = anonymous_bytes()
    tensor = checkpoint.get("w")
    assert tensor.shape == (1 << 24,)
    assert tensor[::4096].sum() == 0
    assert anonymous_bytes() - before < 1 << 23


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("no RssAnon on this system")


@pytest.mark.parametrize("name", [*BUNDLED, *BUNDLED.values()])
def test_bundled_models_open_by_name(name: str) -> None:
    checkpoint = open_checkpoint(name)
    assert checkpoint.path == bundled_path(name)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config["eos_token_id"] == [0, 2]
    assert checkpoint.get("model.norm.weight").dtype == torch.bfloat16
    for fact in ("README.md", "tokenizer.json", "tokenizer_config.json"):
        assert (checkpoint.path / fact).exists()


@pytest.mark.parametrize("keep", [0, 4, 60, 300])
def test_truncated_safetensors_name_the_file(tmp_path: Path, keep: int) -> None:
    out = single(tmp_path, "safetensors")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not"):
        open_checkpoint(out)


def test_corrupt_header_and_corrupt_bin(tmp_path: Path) -> None:
    out = single(tmp_path, "safetensors")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    (out / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(out)
    pickled = single(tmp_path, "bin")
    (pickled / "pytorch_model.bin").write_bytes((pickled / "pytorch_model.bin").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(pickled)


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    out = folder(tmp_path, "evil")
    torch.save({"w": Evil()}, out / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(out)


def test_missing_things(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path, "safetensors"))
    with pytest.raises(CheckpointError, match=r"nearest: model\.layers\.3\.mlp\.up_proj\.weight") as caught:
        checkpoint.get("model.layers.3.mlp.up_prj.weight")
    assert caught.value.details["nearest"][0] == "model.layers.3.mlp.up_proj.weight"
    empty = folder(tmp_path, "empty")
    with pytest.raises(CheckpointError, match="no weights found"):
        open_checkpoint(empty)
    (empty / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        open_checkpoint(empty)
    (empty / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(empty)
    shards = sharded(tmp_path, "safetensors")
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(shards)
    shutil.copy(shards / "model-00001-of-00002.safetensors", shards / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json lists it there"):
        open_checkpoint(shards)


def test_unexpected_dtype(tmp_path: Path) -> None:
    out = folder(tmp_path, "packed")
    save_file({"w.qweight": torch.zeros(4, dtype=torch.int32), "w8": torch.zeros(4).to(torch.float8_e4m3fn)}, out / "model.safetensors")
    checkpoint = open_checkpoint(out)
    with pytest.raises(CheckpointError, match="w8 has dtype float8_e4m3fn, expected one of float32, float16, bfloat16"):
        checkpoint.get("w8")
    assert checkpoint.get("w.qweight", dtypes=(torch.int32,)).dtype == torch.int32
    assert checkpoint.get("w8", dtypes=None).dtype == torch.float8_e4m3fn
    assert checkpoint.nbytes == 20


def test_progress_lines() -> None:
    out = io.StringIO()
    with stderr_progress("loading x", out, every=0.0) as progress:
        progress(1 << 20, 4 << 20)
        progress(4 << 20, 4 << 20)
    assert out.getvalue() == "loading x: 25 % of 4 MiB\nloading x: 100 % of 4 MiB\n"
    with stderr_progress("quick", quiet := io.StringIO()) as progress:
        progress(1, 2)
    assert quiet.getvalue() == ""


class Terminal(io.StringIO):
    """Says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal() -> None:
    with stderr_progress("loading y", out := Terminal()) as progress:
        progress(1 << 20, 2 << 20)
        progress(2 << 20, 2 << 20)
    assert "loading y" in out.getvalue()
