"""Checkpoints with a ``quantization_config``: modules of packed tensors are handed out as one weight each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from presage.core.errors import CheckpointError, PresageError
from presage.models.loading.checkpoint import FLOATS, Checkpoint
from presage.quantize.canonical import Canonical, dense
from presage.quantize.formats.awq import AWQ
from presage.quantize.formats.compressed_tensors import CompressedTensors
from presage.quantize.formats.gptq import GPTQ
from presage.quantize.formats.parts import Format, Parts, unsupported
from presage.quantize.formats.targets import module_class, module_of

FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {"compressed-tensors": CompressedTensors, "gptq": GPTQ, "awq": AWQ}


class QuantizedCheckpoint(Checkpoint):
    """A view of another checkpoint in which a quantised module X has one tensor ``X.weight``, whatever the file calls its parts.

    ``get`` dequantises to float32, ``get_weight`` gives the Canonical; tensors of other modules are the file's own. ``nbytes`` are the
    file's. Raises UnsupportedModel for schemes that no reader knows and CheckpointError for a config that says nothing sensible.
    """

    def __init__(self, inner: Checkpoint) -> None:
        self._form = quantization_format(inner.config)
        self._inner, self.config, self.generation_config = inner, inner.config, inner.generation_config
        self.path, self.nbytes = inner.path, inner.nbytes
        self._present = frozenset(inner.names())
        self._modules = {module_of(n) for n in self._present if n.rpartition(".")[2] in self._form.suffixes}
        if not self._modules:
            raise CheckpointError(f"{self.path}: no tensor is quantised, though quantization_config says {self._form.name}")
        parts = {f"{module}.{suffix}" for module in self._modules for suffix in self._form.hidden}
        self._names = (self._present - parts) | {f"{module}.weight" for module in self._modules}

    def names(self) -> list[str]:
        return sorted(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        self.require(name)
        return self._form.shape(self._parts(name)) if self.quantized(name) else self._inner.shape(name)

    def quantized(self, name: str) -> bool:
        """Is the tensor one that ``get_weight`` gives as Canonical?"""
        return name.endswith(".weight") and module_of(name) in self._modules

    def get_weight(self, name: str) -> torch.Tensor | Canonical:
        """The tensor ``name``, quantised as it is stored. Raises CheckpointError: missing, parts missing or misshapen."""
        self.require(name)
        return self._form.read(self._parts(name)) if self.quantized(name) else self._plain(name, FLOATS)

    def get(self, name: str, dtypes: tuple[torch.dtype, ...] | None = FLOATS) -> torch.Tensor:
        """The tensor ``name``; float32 if it is stored quantised."""
        self.require(name)
        return self._read(name) if self.quantized(name) else self._plain(name, dtypes)

    def stored_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        self.require(name)
        if not self.quantized(name):
            return self._inner.stored_bytes(name, dtype)
        module = module_of(name)
        stored = sum(self._inner.stored_bytes(n) for s in self._form.hidden if (n := f"{module}.{s}") in self._present)
        # Rows of an embedding are looked up one by one, so it is held dense (and packed as well if it is the head).
        return stored + (self._count(name) * dtype.itemsize if dtype is not None and module_class(module) == "Embedding" else 0)

    def _count(self, name: str) -> int:
        n, k = self.shape(name)
        return n * k

    def _read(self, name: str) -> torch.Tensor:
        return dense(self._form.read(self._parts(name)), torch.float32)

    def _plain(self, name: str, dtypes: tuple[torch.dtype, ...] | None) -> torch.Tensor:
        tensor = self._inner.get(name, dtypes=None)
        if dtypes is not None and tensor.dtype == torch.int8:
            raise CheckpointError(f"{self.path}: tensor {module_of(name)}.weight_scale is missing; {name} holds codes", tensor=name)
        return self._inner.get(name, dtypes)

    def _parts(self, name: str) -> Parts:
        return Parts(self._inner, module_of(name), self._present)


def quantized(checkpoint: Any) -> Any:
    """The checkpoint itself, or the view of it that understands its ``quantization_config``. Raises as QuantizedCheckpoint does."""
    if isinstance(checkpoint, QuantizedCheckpoint) or quantization_config(checkpoint.config) is None:
        return checkpoint
    return QuantizedCheckpoint(checkpoint)


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a config.json, where models with several halves and older tools put it; None if there is none."""
    for place in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key):
                found: Mapping[str, Any] = place[key]
                return found
    return None


def quantization_format(config: Mapping[str, Any]) -> Format:
    """The reader of a config.json's quantised weights. Raises UnsupportedModel and CheckpointError."""
    found = quantization_config(config)
    if not isinstance(found, Mapping):
        raise CheckpointError("config.json: quantization_config is no object")
    method = str(found.get("quant_method", "an unknown method"))
    if method not in FORMATS:
        raise unsupported(method, "this method")
    try:
        return FORMATS[method](found)
    except PresageError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"config.json: quantization_config of {method} cannot be understood ({error!r})") from error
