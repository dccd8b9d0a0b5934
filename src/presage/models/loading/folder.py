"""Hugging Face folders: safetensors (one file or shards with an index) and torch ``.bin`` files."""

from __future__ import annotations

import pickle
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from presage.core.errors import CheckpointError
from presage.models.loading.checkpoint import Checkpoint, read_generation_config, read_json

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
_FLOATS = ("F64", "F32", "F16", "BF16")
_WIDTH = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Shard:
    """One safetensors file: its header is parsed by the ``safetensors`` package, tensors are slices of a mapping of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(str(path), framework="pt", device="cpu")
            self.keys: frozenset[str] = frozenset(self._file.keys())
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def nbytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor; of one of floats, as ``dtype``."""
        part = self._file.get_slice(name)
        kind = part.get_dtype()
        return prod(part.get_shape()) * (dtype.itemsize if dtype is not None and kind in _FLOATS else _WIDTH.get(kind, 1))

    def read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read ({error})") from error
        return tensor


class BinShard:
    """One torch pickle, loaded with ``weights_only`` (no code runs) and mapped, so that tensors cost nothing until touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{path}: truncated or not a torch checkpoint of plain tensors ({reason})") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: expected a dict of tensors, got {type(data).__name__}")
        self._data: dict[str, torch.Tensor] = {k: v for k, v in data.items() if isinstance(v, torch.Tensor)}
        self.keys = frozenset(self._data)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._data[name].shape)

    def nbytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor; of one of floats, as ``dtype``."""
        tensor = self._data[name]
        return tensor.numel() * (dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.itemsize)

    def read(self, name: str) -> torch.Tensor:
        return self._data[name]


class FolderCheckpoint(Checkpoint):
    """A folder with config.json and weights in one or more files. All files are opened (not read) at once, so a missing one shows early."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_json(folder / "config.json")
        self.generation_config = read_generation_config(folder)
        self._where = self._open()
        self.nbytes = sum(shard.nbytes(name) for name, shard in self._where.items())

    def names(self) -> list[str]:
        return sorted(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        self.require(name)
        return self._where[name].shape(name)

    def stored_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        self.require(name)
        return self._where[name].nbytes(name, dtype)

    def _read(self, name: str) -> torch.Tensor:
        return self._where[name].read(name)

    def _open(self) -> dict[str, Shard | BinShard]:
        for index in INDEXES:
            if (self.path / index).exists():
                return self._open_index(self.path / index)
        for single in SINGLES:
            if (self.path / single).exists():
                shard = _shard(self.path / single)
                return dict.fromkeys(shard.keys, shard)
        loose = sorted(self.path.glob("*.safetensors"))
        if not loose:
            raise CheckpointError(f"{self.path}: no weights found, looked for {', '.join((*SINGLES, *INDEXES))} and *.safetensors")
        return {key: shard for shard in map(_shard, loose) for key in shard.keys}

    def _open_index(self, index: Path) -> dict[str, Shard | BinShard]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map")
        shards = {file: _shard(self.path / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in shards[file].keys:
                raise CheckpointError(f"{self.path / file}: tensor {name} is missing, though {index.name} lists it there")
        return {name: shards[file] for name, file in weight_map.items()}


def _shard(path: Path) -> Shard | BinShard:
    return Shard(path) if path.suffix == ".safetensors" else BinShard(path)
