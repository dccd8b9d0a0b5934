"""Checkpoints in: find one by name, open it without reading it, hand out tensors one by one.

``open_checkpoint`` covers Hugging Face folders (safetensors, sharded or not, and torch ``.bin``), GGUF files and ``dummy`` weights.
Names load lazily: resolving a tokenizer's folder must not cost an import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from presage.models.loading.checkpoint import Checkpoint, Progress
    from presage.models.loading.locate import resolve
    from presage.models.loading.memory import available_memory, check_memory
    from presage.models.loading.opening import open_checkpoint
    from presage.models.loading.progress import stderr_progress

__all__ = ["Checkpoint", "Progress", "available_memory", "check_memory", "open_checkpoint", "resolve", "stderr_progress"]
_HOMES = {
    "Checkpoint": "checkpoint",
    "Progress": "checkpoint",
    "available_memory": "memory",
    "check_memory": "memory",
    "open_checkpoint": "opening",
    "stderr_progress": "progress",
    "resolve": "locate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
