"""Packed weights on disk: the second start reads what the first wrote, and only what is whole and of this checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import presage
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.engine.build import load_model
from presage.kernels.cpu import cache
from presage.kernels.cpu.memory import HUGE, Arena
from presage.kernels.cpu.pack_store import SUFFIX, PackStore, pack_store
from presage.models.base import Model

MODEL = Path(presage.__file__).parent / "bundled" / "presage_tiny"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for packed weights; kernels stay where they are."""
    real = cache.cache_directory
    monkeypatch.setattr(cache, "cache_directory", lambda of="kernels": tmp_path / of if of == "packed" else real(of))
    return tmp_path / "packed"


def load(model: Path = MODEL, quantization: str = "w4a8-g32", **more: object) -> Model:
    """The model alone, on one thread."""
    config = EngineConfig.of(model=str(model), quantization=quantization, threads=1, **more)
    built: Model = load_model(config)[1]
    return built


def packs(model: Model) -> list[torch.Tensor]:
    """The bytes of every packed weight."""
    linears = [lin for layer in model.layers for lin in (layer.attention.qkv, layer.attention.o, layer.mlp.up, layer.mlp.down)]
    return [p.data.clone() for lin in (*linears, model.lm_head) for p in lin.packs]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a16-g32-z", "bf16x12"])
def test_second_load_reads_the_same_bytes(root: Path, scheme: str) -> None:
    dtype = "bfloat16"
    first = packs(load(quantization=scheme, dtype=dtype))
    (file,) = root.glob("*" + SUFFIX)
    second = load(quantization=scheme, dtype=dtype)
    assert second.ops._store.hits == len(first)
    assert all(torch.equal(a, b) for a, b in zip(first, packs(second), strict=True))
    assert [f.name for f in root.iterdir()] == [file.name]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_file_is_made_again(root: Path, damage: str) -> None:
    first = packs(load())
    (file,) = root.glob("*" + SUFFIX)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes({"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b"", "foreign": b"x" * 4096}[damage])
    again = load()
    assert all(torch.equal(a, b) for a, b in zip(first, packs(again), strict=True))
    whole = [load(), load()][-1]
    assert whole.ops._store.hits == len(first)


def test_another_checkpoint_or_scheme_is_another_file(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    load(copy)
    load(copy, quantization="w8a8")
    assert len(list(root.glob("*" + SUFFIX))) == 2
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert load(copy).ops._store.hits == 0
    assert len(list(root.glob("*" + SUFFIX))) == 3


def test_failed_load_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), pack_store(tmp_path / "x.packed", 1 << 30):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_off_and_read_only(root: Path, tmp_path: Path) -> None:
    load(packed_weights_bytes=0)
    assert not root.exists()
    (tmp_path / "file").write_text("")
    store = PackStore(tmp_path / "file" / "x.packed")  # a folder that cannot be made
    assert not store.ready
    store.finish()


def test_old_files_are_pruned(root: Path) -> None:
    load(quantization="w8a8")
    size = next(root.glob("*" + SUFFIX)).stat().st_size
    load(quantization="w4a8-g32", packed_weights_bytes=size)
    assert len(list(root.glob("*" + SUFFIX))) == 1


def test_lossless_packing_needs_bf16(root: Path) -> None:
    with pytest.raises(ConfigError):
        load(quantization="bf16x12", dtype="float32")


def test_arena_hands_out_disjoint_aligned_memory() -> None:
    arena, made = Arena(), []
    for i, size in enumerate([1, 64, 100, 3 * HUGE, 70 << 20, 5]):
        made.append(arena.take(size).fill_(i))
        assert made[-1].data_ptr() % 64 == 0 and len(made[-1]) == size
    assert all((m == i).all() for i, m in enumerate(made))
    source = torch.randn(3, 5)
    assert torch.equal(arena.copy(source), source)
