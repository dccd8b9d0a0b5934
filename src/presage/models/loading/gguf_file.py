"""GGUF checkpoints: metadata and quantised tensors through the ``gguf`` package, handed out under Hugging Face's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from presage.core.errors import CheckpointError
from presage.models.loading.checkpoint import Checkpoint
from presage.models.loading.gguf_config import gguf_config
from presage.models.loading.gguf_names import hf_name, undo_layout
from presage.quantize.canonical import Canonical
from presage.quantize.formats.gguf_blocks import from_gguf, readable
from presage.quantize.formats.targets import module_class, module_of

_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PLAIN = {"F32": torch.float32, "F16": torch.float16}


class GGUFCheckpoint(Checkpoint):
    """A .gguf file. F32, F16 and BF16 tensors are views of the mapped file; ``get`` dequantises the others to float32, ``get_weight``
    gives those that ``quantize.formats.gguf_blocks`` knows as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = open_gguf(path)
        self.generation_config = {}
        raw = {t.name: t for t in self.reader.tensors}
        shapes = {name: _shape(t) for name, t in raw.items()}
        freqs = np.asarray(raw["rope_freqs.weight"].data) if "rope_freqs.weight" in raw else None
        self.config = gguf_config(self.meta, shapes, freqs, str(path))
        self._arch = str(self.config["model_type"])
        self._tensors = {self._hf_name(name): t for name, t in raw.items() if name not in _NOT_WEIGHTS}
        self.nbytes = sum(int(t.n_bytes) for t in self._tensors.values())

    def meta(self, key: str, default: Any) -> Any:
        """One metadata value as a Python object; ``{arch}`` in the key stands for the architecture's name."""
        return read_meta(self.reader, key, default)

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        self.require(name)
        return _shape(self._tensors[name])

    def get_weight(self, name: str) -> torch.Tensor | Canonical:
        """The tensor ``name``; a matrix of blocks that we know as Canonical, its rows in Hugging Face's order."""
        self.require(name)
        raw = self._tensors[name]
        weight = from_gguf(raw.tensor_type.name, raw.data) if self._quantized(raw) else None
        if weight is None:
            return self.get(name)
        rows = torch.arange(weight.shape[0])
        order = self._undo(name, rows)
        return weight if torch.equal(order, rows) else weight.by_row(lambda part: part[order])

    def stored_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        self.require(name)
        raw = self._tensors[name]
        count = int(raw.n_elements)
        if dtype is None or self._quantized(raw):
            # Rows of an embedding are looked up one by one, so it is held dense (and packed as well if it is the head).
            looked_up = dtype is not None and module_class(module_of(name)) == "Embedding"
            return int(raw.n_bytes) + (count * dtype.itemsize if dtype is not None and looked_up else 0)
        return count * dtype.itemsize

    @staticmethod
    def _quantized(raw: Any) -> bool:
        return len(raw.shape) == 2 and readable(raw.tensor_type.name)

    def _hf_name(self, name: str) -> str:
        mapped = hf_name(self._arch, name)
        if mapped is None:
            raise CheckpointError(f"{self.path}: tensor {name} has no place in architecture {self._arch}")
        return mapped

    def _read(self, name: str) -> torch.Tensor:
        return self._undo(name, self._plain(name))

    def _undo(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return undo_layout(self._arch, name, rows, self.config["num_attention_heads"], self.config["num_key_value_heads"])

    def _plain(self, name: str) -> torch.Tensor:
        from gguf import quants

        raw = self._tensors[name]
        kind = raw.tensor_type.name
        if kind in _PLAIN:
            return torch.from_numpy(np.asarray(raw.data)).view(_shape(raw))
        if kind == "BF16":
            return torch.from_numpy(np.ascontiguousarray(raw.data).view(np.int16)).view(torch.bfloat16).view(_shape(raw))
        try:
            return torch.from_numpy(quants.dequantize(raw.data, raw.tensor_type)).view(_shape(raw))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} of type {kind} cannot be dequantised ({error})") from error


def open_gguf(path: Path) -> Any:
    """The package's reader over a private mapping. Raises CheckpointError for missing, truncated and foreign files."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Each slice of a memmap pays for bookkeeping that a plain view of it does not need: a vocabulary reads twice as fast."""

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if type(self.data) is not np.ndarray:
                self.data: Any = np.asarray(self.data)
            return super()._get(*args, **kwargs)

    try:
        # "c" maps copy-on-write: torch insists on writable memory, the file stays as it is.
        return Reader(path, "c")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: truncated or not a GGUF file ({error})") from error


def read_meta(reader: Any, key: str, default: Any) -> Any:
    """One metadata value of a ``GGUFReader`` as a Python object."""
    if "{arch}" in key:
        key = key.replace("{arch}", str(read_meta(reader, "general.architecture", "")))
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF lists dimensions from the fastest one on; torch from the slowest."""
    return tuple(int(n) for n in reversed(tensor.shape))
