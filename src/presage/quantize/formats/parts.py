"""What all readers share: the tensors of one module, fetched with their shapes and types checked, and groups in any order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.quantize.canonical import Canonical

SUPPORTED = (
    "compressed-tensors (pack-quantized and int-quantized, weights of 4 or 8 bits, input activations none or int8 per token), "
    "gptq (4 or 8 bits), awq (gemm, 4 bits)"
)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
Shape = tuple[int, ...]


class Raw(Protocol):
    """A checkpoint's tensors as they are in the file (``models.loading.Checkpoint``)."""

    path: Path

    def names(self) -> list[str]:
        """Tensor names."""

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, unread."""

    def get(self, name: str, dtypes: tuple[torch.dtype, ...] | None = None) -> torch.Tensor:
        """One tensor of one of the types. Raises CheckpointError naming it: missing, of another type."""


class Format(Protocol):
    """A way to store quantised modules. A module is quantised if it has a tensor with one of ``suffixes``; ``hidden`` are all that its
    weight is made of."""

    name: str
    suffixes: tuple[str, ...]
    hidden: tuple[str, ...]

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K) of a module's weight, without reading it."""

    def read(self, parts: Parts) -> Canonical:
        """A module's weight."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one module of a checkpoint."""

    raw: Raw
    module: str
    present: frozenset[str]

    def has(self, suffix: str) -> bool:
        """Is there a tensor ``module.suffix``?"""
        return f"{self.module}.{suffix}" in self.present

    def shape(self, suffix: str) -> Shape:
        """Shape of a matrix. Raises CheckpointError naming it: missing, or not of two dimensions."""
        shape = self.raw.shape(self._name(suffix))
        if len(shape) != 2:
            raise self.wrong(suffix, f"has shape {list(shape)}, expected a matrix")
        return shape

    def get(self, suffix: str, dtypes: tuple[torch.dtype, ...], *shapes: Shape) -> torch.Tensor:
        """A tensor of one of the types and one of the shapes. Raises CheckpointError naming it."""
        tensor = self.raw.get(self._name(suffix), dtypes)
        if shapes and tuple(tensor.shape) not in shapes:
            raise self.wrong(suffix, f"has shape {list(tensor.shape)}, expected {' or '.join(str(list(s)) for s in shapes)}")
        return tensor

    def scales(self, suffix: str, *shapes: Shape) -> torch.Tensor:
        """Scales, which must be finite: a file of zeros and noise shows here before it shows as babble."""
        scale = self.get(suffix, SCALES, *shapes)
        if not torch.isfinite(scale).all():
            raise self.wrong(suffix, "has scales that are not finite")
        return scale

    def groups(self, k: int, group: int) -> int:
        """Groups of ``group`` inputs. Raises UnsupportedModel if they do not divide K: formats differ in what a rest would mean."""
        if k % group:
            raise UnsupportedModel(f"{self.module}: {k} inputs are no multiple of the group size {group}", param="model")
        return k // group

    def order(self, suffix: str, k: int, group: int) -> torch.Tensor | None:
        """Act-order: inputs sorted by group, int64 [K], from the group of every input; None if they are in order.

        Raises CheckpointError if a group has not exactly ``group`` inputs.
        """
        if not self.has(suffix):
            return None
        index = self.get(suffix, (torch.int32, torch.int64), (k,)).long()
        if torch.equal(index, torch.arange(k) // group) or bool((index == -1).all()):
            return None
        count = k // group
        if int(index.min()) < 0 or int(index.max()) >= count or bool((torch.bincount(index, minlength=count) != group).any()):
            raise self.wrong(suffix, f"does not name {count} groups of {group} inputs each")
        return torch.argsort(index, stable=True)

    def wrong(self, suffix: str, what: str) -> CheckpointError:
        """An error about one of the tensors."""
        return CheckpointError(f"{self.raw.path}: tensor {self.module}.{suffix} {what}", tensor=f"{self.module}.{suffix}")

    def _name(self, suffix: str) -> str:
        if not self.has(suffix):
            raise CheckpointError(f"{self.raw.path}: tensor {self.module}.{suffix} is missing", tensor=f"{self.module}.{suffix}")
        return f"{self.module}.{suffix}"


def unsupported(method: str, what: str) -> UnsupportedModel:
    """The refusal of a scheme, with all that is supported."""
    return UnsupportedModel(f"weights quantised by {method}: {what} is not supported; supported: {SUPPORTED}", param="model")
