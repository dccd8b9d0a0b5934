"""What every checkpoint format offers: a config as a dict, tensor names, and tensors on demand."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from presage.core.errors import CheckpointError
from presage.quantize.canonical import Canonical

Progress = Callable[[int, int], None]
FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
NEAREST = 3


class Checkpoint(ABC):
    """An open checkpoint. Nothing is read until ``get``; ``config`` is Hugging Face's config.json whatever the format.

    ``path`` is the folder or file, ``nbytes`` the size of all tensors as they are stored, ``generation_config`` may be empty.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    nbytes: int

    @abstractmethod
    def names(self) -> list[str]:
        """Tensor names in Hugging Face's spelling, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading it. Raises CheckpointError if it is missing."""

    @abstractmethod
    def stored_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of one tensor as it is stored, or in memory if dense ones are held in ``dtype``."""

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, which exists."""

    def __contains__(self, name: object) -> bool:
        return name in set(self.names())

    def get(self, name: str, dtypes: tuple[torch.dtype, ...] | None = FLOATS) -> torch.Tensor:
        """The tensor ``name``, on the CPU, mapped from the file where the format allows.

        ``dtypes`` are the ones the caller understands (None = any): packed formats of other tools would otherwise load as numbers
        they are not. Raises CheckpointError: missing (the message lists the nearest names), unexpected dtype, truncated file.
        """
        self.require(name)
        tensor = self._read(name)
        if dtypes is not None and tensor.dtype not in dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected one of {known}"
            )
        return tensor

    def get_weight(self, name: str) -> torch.Tensor | Canonical:
        """The tensor ``name`` as it is stored: a Canonical if it is quantised, else what ``get`` gives. Raises as ``get`` does."""
        return self.get(name)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights in memory: quantised ones as they are, dense ones in ``dtype``."""
        return sum(self.stored_bytes(name, dtype) for name in self.names())

    def require(self, name: str) -> None:
        """Raise CheckpointError naming the nearest tensors unless ``name`` exists."""
        if name in self:
            return
        near = get_close_matches(name, self.names(), NEAREST, 0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise CheckpointError(f"{self.path}: no tensor {name}{hint}", tensor=name, nearest=near)

    def items(self, progress: Progress | None = None, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one by one; ``progress(done bytes, total bytes)`` is called after the caller took each one."""
        done = 0
        for name in list(names) if names is not None else self.names():
            tensor = self.get(name, dtypes=None)
            yield name, tensor
            done += tensor.nbytes
            if progress is not None:
                progress(min(done, self.nbytes), self.nbytes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file and, for bad JSON, the place."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a folder, or an empty dict: it is optional in the field."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}
