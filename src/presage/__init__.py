"""Presage: an LLM serving engine. The public names load lazily so that the simulator and the policies import without torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "presage.engine.llm",
    "AsyncLLM": "presage.engine.async_llm",
    "SamplingParams": "presage.core.sampling_params",
    "StructuredOutputsParams": "presage.core.sampling_params",
    "RequestOutput": "presage.engine.outputs",
    "CompletionOutput": "presage.engine.outputs",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'presage' has no attribute {name!r}")
