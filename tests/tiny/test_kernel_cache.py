"""Kernels from disk: several processes may have compiled them, and they must not get into each other's way in one that loads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny.times_kernel import run_times

ROOT = Path(__file__).parents[2]


def _in_a_process(folder: Path, *factors: int) -> list[int]:
    code = f"from tests.tiny.times_kernel import run_times; print(*[run_times(f) for f in {factors}])"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    return [int(word) for word in found.stdout.split()]


def test_kernels_compiled_by_different_processes_keep_their_own_subroutines(tmp_path: Path) -> None:
    assert _in_a_process(tmp_path, 3) == [30]
    assert _in_a_process(tmp_path, 5) == [50]
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    assert _in_a_process(tmp_path, 3, 5) == [30, 50]
    assert _in_a_process(tmp_path, 5, 3) == [50, 30]


def test_in_one_process() -> None:
    assert (run_times(2), run_times(7)) == (20, 70)
