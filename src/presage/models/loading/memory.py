"""Will it fit? Asked before anything is loaded, with the container's limits and not only the machine's RAM."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor
from pathlib import Path

from presage.core.errors import NotEnoughMemory

_UNLIMITED = 1 << 60
_MIB, _GIB = 1 << 20, 1 << 30


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process can still take: the least of MemAvailable and the room under every cgroup limit (v2 and v1) above it.

    Page cache counts as room: the kernel gives it back before it kills anybody. ``root`` is where /proc and /sys are found.
    """
    rooms = [_meminfo(root), *_cgroup2(root), *_cgroup1(root)]
    return max(0, min(rooms))


def check_memory(weight_bytes: int, kv_bytes_min: int, available: int) -> None:
    """Raise NotEnoughMemory with the numbers unless weights and the least possible KV cache fit into ``available`` bytes."""
    need = weight_bytes + kv_bytes_min
    if need <= available:
        return
    raise NotEnoughMemory(
        f"the model needs {_mib(need)} ({_mib(weight_bytes)} of weights, at least {_mib(kv_bytes_min)} of KV cache) "
        f"but only {_mib(available, floor)} of memory is available; take a smaller or quantised model, or a lower max_model_len",
        weight_bytes=weight_bytes,
        kv_bytes_min=kv_bytes_min,
        available=available,
    )


def _mib(n: int, rounded: Callable[[float], int] = ceil) -> str:
    # Needs are rounded up and room is rounded down, so that the message never says 3 MiB do not fit into 3 MiB.
    return f"{rounded(n / _MIB):,} MiB" if n < 10 * _GIB else f"{rounded(10 * n / _GIB) / 10:,.1f} GiB"


def _meminfo(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _cgroup2(root: Path) -> list[int]:
    base = root / "sys/fs/cgroup"
    return [_room(d, "memory.max", "memory.current", "inactive_file") for d in _ancestors(base, _member(root, ""))]


def _cgroup1(root: Path) -> list[int]:
    base = root / "sys/fs/cgroup/memory"
    return [
        _room(d, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") for d in _ancestors(base, _member(root, "memory"))
    ]


def _member(root: Path, controller: str) -> str:
    """Path of this process inside a cgroup hierarchy, from /proc/self/cgroup (lines ``id:controllers:path``; v2 has no controllers)."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in controllers.split(","):
            return path.strip("/")
    return ""


def _ancestors(base: Path, member: str) -> list[Path]:
    """The member's folder and all above it up to ``base``: a parent's limit binds too (in a container only ``base`` may exist)."""
    folders, here = [base], base
    for part in Path(member).parts:
        here = here / part
        folders.append(here)
    return [f for f in folders if f.is_dir()]


def _room(folder: Path, limit_file: str, usage_file: str, cache_key: str) -> int:
    limit = _number(folder / limit_file)
    if limit is None or limit >= _UNLIMITED:
        return _UNLIMITED
    cache = 0
    for line in _lines(folder / "memory.stat"):
        if line.startswith(cache_key + " "):
            cache = int(line.split()[1])
    return limit - (_number(folder / usage_file) or 0) + cache


def _number(path: Path) -> int | None:
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
