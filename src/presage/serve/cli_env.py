"""``presage collect-env``: what a bug report needs to know about the machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from presage import __version__
from presage.serve.cli import app

PACKAGES = (
    "torch", "numpy", "numba", "llvmlite", "transformers", "tokenizers", "safetensors", "pydantic", "msgspec", "xgrammar",
    "fastapi", "uvicorn", "uvloop", "pyzmq", "openai", "aiohttp",
)  # fmt: skip
FLAGS = (
    "sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8",
    "asimd", "bf16",
)  # fmt: skip
VARIABLES = ("OMP_NUM_THREADS", "NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def cpu_facts() -> tuple[str, list[str]]:
    """(model name, known flags it has) from /proc/cpuinfo; the platform's word and no flags where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    has = set(facts.get("flags", facts.get("Features", "")).split())
    return facts.get("model name", platform.machine()), [f for f in FLAGS if f in has]


def package_versions() -> dict[str, str]:
    """Installed version of each package we lean on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def variables() -> dict[str, str]:
    """Environment variables that change what runs; values that could be secrets are hidden."""
    names = [n for n in os.environ if n.startswith("PRESAGE_") or n in VARIABLES]
    return {n: "(hidden)" if any(word in n for word in SECRET) else os.environ[n] for n in sorted(names)}


def facts() -> dict[str, Any]:
    """All facts by heading."""
    import torch

    from presage.core.config import EngineConfig
    from presage.engine.build import thread_count
    from presage.kernels.cpu.isa import current_isa
    from presage.models.loading import available_memory

    name, flags = cpu_facts()
    return {
        "presage": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": name,
        "cpu flags": " ".join(flags),
        "kernels": str(current_isa()),
        "cores of this process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of a step": thread_count(EngineConfig()),
        "memory available": f"{available_memory() / (1 << 30):.1f} GiB",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "packages": package_versions(),
        "environment": variables(),
    }


@app.command(name="collect-env")
def collect_env(*, as_json: Annotated[bool, Parameter(name="--json")] = False) -> int:
    """Print versions, CPU, memory and kernels: paste it into bug reports.

    Parameters
    ----------
    as_json:
        Print JSON instead of text.
    """
    found = facts()
    if as_json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            print("\n".join(f"  {k}: {v}" for k, v in value.items()) or "  none")
        else:
            print(f"{key}: {value}")
    return 0
