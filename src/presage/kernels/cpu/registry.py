"""All kernels of this folder: found by asking each module for `warm_kernels()`, so a new file needs no entry anywhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from presage.kernels import cpu
from presage.kernels.cpu.cache import Kernel, Progress, compile_all


def all_kernels() -> Iterator[Kernel]:
    """Every kernel variant that modules of this folder ask to be warmed, each once."""
    seen: set[int] = set()
    for module in pkgutil.iter_modules(cpu.__path__, cpu.__name__ + "."):
        for item in getattr(importlib.import_module(module.name), "warm_kernels", tuple)():
            if id(item) not in seen:
                seen.add(id(item))
                yield item


def warm_up(progress: Progress | None = None) -> int:
    """Compile or load all of them; see `cache.compile_all`. Returns how many had to be compiled."""
    return compile_all(all_kernels(), progress)
