"""Random weights of the right shapes from config.json alone, for measuring speed without a download.

Deterministic: a tensor's values depend on its name and shape only. One block of normal numbers is drawn once; each tensor is cut from
its endless repetition at an offset given by its name. The block's length is prime, so rows of any width differ; copying runs at memory
speed (a billion parameters in a few seconds) where drawing them would take ten times longer.
"""

from __future__ import annotations

import zlib
from math import prod
from pathlib import Path
from typing import Any

import torch

from presage.core.errors import CheckpointError
from presage.models.loading.checkpoint import Checkpoint, read_generation_config, read_json
from presage.models.loading.shapes import weight_shapes

BLOCK = 1_048_573
SEED = 20_240_229
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DummyCheckpoint(Checkpoint):
    """Normal weights with the config's ``initializer_range`` (0.02), norms at the identity, in the config's dtype."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: dummy weights need a folder with config.json")
        self.path = folder
        self.config = read_json(folder / "config.json")
        # Made-up weights are dense, whatever the real ones are.
        self.config.pop("quantization_config", None)
        self.generation_config = read_generation_config(folder)
        self._dtype = config_dtype(self.config)
        self._shapes = weight_shapes(self.config)
        self._block: torch.Tensor | None = None
        self.nbytes = sum(prod(s) for s in self._shapes.values()) * self._dtype.itemsize

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        self.require(name)
        return self._shapes[name]

    def stored_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        return prod(self.shape(name)) * (dtype or self._dtype).itemsize

    def _read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.full(shape, self._identity(), dtype=self._dtype)
        return self._cut(zlib.crc32(name.encode()) % BLOCK, prod(shape)).view(shape)

    def _identity(self) -> float:
        # Gemma's norms multiply by 1 + weight.
        return 0.0 if str(self.config.get("model_type", "")).startswith("gemma") else 1.0

    def _cut(self, offset: int, count: int) -> torch.Tensor:
        if self._block is None:
            draw = torch.randn(BLOCK, generator=torch.Generator().manual_seed(SEED))
            self._block = (draw * float(self.config.get("initializer_range", 0.02))).to(self._dtype)
        out = torch.empty(count, dtype=self._dtype)
        head = min(count, BLOCK - offset)
        out[:head] = self._block[offset : offset + head]
        whole = (count - head) // BLOCK
        if whole:
            out[head : head + whole * BLOCK].view(whole, BLOCK).copy_(self._block.expand(whole, BLOCK))
        tail = count - head - whole * BLOCK
        out[count - tail :] = self._block[:tail]
        return out


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config names (``dtype`` since transformers 5, ``torch_dtype`` before); bfloat16 if it names none we know."""
    text = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return _DTYPES.get(text, torch.bfloat16)
