"""``open_checkpoint``: one door for every format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from presage.core.errors import CheckpointError
from presage.models.loading.checkpoint import Checkpoint
from presage.models.loading.locate import resolve

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]


def open_checkpoint(path_or_name: str | Path, revision: str | None = None, load_format: LoadFormat = "auto") -> Checkpoint:
    """Open a checkpoint by name, folder or file; nothing but headers is read.

    ``auto`` takes a .gguf file as GGUF and everything else as a Hugging Face folder; ``dummy`` needs only config.json. Quantised
    weights have the names of dense ones. Raises CheckpointError (missing, truncated, wrong format) and UnsupportedModel (dummy shapes
    of an unknown architecture, a quantisation that we cannot read).
    """
    path = resolve(path_or_name, revision, weights=load_format != "dummy")
    if load_format == "dummy":
        from presage.models.loading.dummy import DummyCheckpoint

        return DummyCheckpoint(path)
    if path.suffix == ".gguf":
        if load_format == "safetensors":
            raise CheckpointError(f"{path}: is a GGUF file, but load_format is safetensors")
        from presage.models.loading.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if load_format == "gguf":
        raise CheckpointError(f"{path}: load_format is gguf, but this is not a .gguf file")
    from presage.models.loading.folder import FolderCheckpoint
    from presage.models.loading.quantized import quantized

    return quantized(FolderCheckpoint(path))
