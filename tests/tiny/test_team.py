"""The thread pool: constant, exact, and with the same results whichever pool is behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.cache import kernel
from presage.kernels.cpu.region import HEADER, barrier, claim, enter, leave, share, team_size
from presage.kernels.cpu.simd import atomic_add, get_i64, set_i64
from presage.kernels.cpu.team import OpenMPPool, ParkedPool, Team, openmp_library

ITEMS, OUT = HEADER, HEADER + 1


@kernel
def count_items() -> Any:
    """Adds 1 to out[item] for every item claimed."""

    def run(table):  # type: ignore[no-untyped-def]
        enter(table)
        item = claim(table)
        while item < get_i64(table, ITEMS):
            atomic_add(get_i64(table, OUT), item, 1)
            item = claim(table)
        leave(table)

    return run


@kernel
def ranks_and_shares() -> Any:
    """out[rank] counts ranks; out[size + i] counts the static shares of ITEMS."""

    def run(table):  # type: ignore[no-untyped-def]
        rank, size, out = enter(table), team_size(table), get_i64(table, OUT)
        atomic_add(out, rank, 1)
        start, stop = share(get_i64(table, ITEMS), rank, size)
        for item in range(start, stop):
            atomic_add(out, size + item, 1)

    return run


@kernel
def two_phases() -> Any:
    """Each rank writes its place, then after the barrier sums everybody's: out[size + rank] = sum of 1 .. size, many times."""

    def run(table):  # type: ignore[no-untyped-def]
        rank, size, out = enter(table), team_size(table), get_i64(table, OUT)
        for turn in range(get_i64(table, ITEMS)):
            set_i64(out, rank, (turn + 1) * (rank + 1))
            barrier(table)
            total = 0
            for other in range(size):
                total += get_i64(out, other)
            if total == (turn + 1) * size * (size + 1) // 2:
                atomic_add(out, size + rank, 1)
            barrier(table)

    return run


@pytest.fixture(params=["openmp", "parked"])
def pool_kind(request: pytest.FixtureRequest) -> str:
    """Both pools."""
    return str(request.param)


@pytest.fixture(params=[1, 2, 3])
def team(request: pytest.FixtureRequest, pool_kind: str) -> Iterator[Team]:
    """Teams of one, two and three threads."""
    if pool_kind == "openmp":
        library = openmp_library()
        if library is None:
            pytest.skip("no OpenMP runtime in this process")
        yield Team(request.param, OpenMPPool(library))
    else:
        pool = ParkedPool(request.param)
        yield Team(request.param, pool)
        pool.close()


def test_every_item_is_claimed_once_in_every_call(team: Team) -> None:
    table, out = team.table(2), np.zeros(1000, np.int64)
    for turn, items in enumerate((1000, 0, 1000, 7, 1000)):
        team.run(count_items(), table.set(items, out.ctypes.data), work=0 if turn % 2 else 1 << 30)
    assert (out[:7] == 4).all() and (out[7:] == 3).all()


@pytest.mark.parametrize("items", [0, 1, 2, 5, 64])
def test_ranks_are_distinct_and_shares_cover(team: Team, items: int) -> None:
    table, out = team.table(2), np.zeros(team.threads + items, np.int64)
    for _ in range(10):
        team.run(ranks_and_shares(), table.set(items, out.ctypes.data))
    assert (out == 10).all()


def test_barrier(team: Team) -> None:
    turns, table, out = 20, team.table(2), np.zeros(2 * team.threads, np.int64)
    team.run(two_phases(), table.set(turns, out.ctypes.data))
    assert (out[team.threads :] == turns).all()


def test_torch_with_one_thread_does_not_shrink_the_team() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        team, out = Team(2), np.zeros(2, np.int64)
        table = team.table(2)  # by name: a temporary would be freed while the kernel still counts in it
        team.run(ranks_and_shares(), table.set(0, out.ctypes.data))
        assert (out == 1).all()
    finally:
        torch.set_num_threads(before)


def native_threads() -> int:
    """Threads of this process as the system counts them."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_stay_constant_and_two_teams_do_not_multiply_them() -> None:
    if openmp_library() is None:
        pytest.skip("no OpenMP runtime in this process")
    out = np.zeros(2, np.int64)
    teams = [Team(2), Team(2)]
    tables = [team.table(2) for team in teams]
    counts = set()
    for _ in range(50):
        for team, table in zip(teams, tables, strict=True):
            team.run(ranks_and_shares(), table.set(0, out.ctypes.data))
            counts.add(native_threads())
    torch.ones(1 << 20).sum()
    counts.add(native_threads())
    assert len(counts) == 1 and (out == 100).all()


def test_long_kernels_let_other_python_threads_run() -> None:
    team, seen, stop = Team(1), [0], threading.Event()
    table, out = team.table(2), np.zeros(1, np.int64)

    def tick() -> None:
        while not stop.is_set():
            seen[0] += 1
            time.sleep(0)

    other = threading.Thread(target=tick)
    other.start()
    try:
        before = seen[0]
        deadline = time.monotonic() + 20
        while seen[0] <= before and time.monotonic() < deadline:
            team.run(two_phases(), table.set(1000, out.ctypes.data), work=1 << 30)
        assert seen[0] > before
    finally:
        stop.set()
        other.join()


def test_a_team_needs_a_thread() -> None:
    with pytest.raises(ConfigError):
        Team(0)


SCRIPT = """
import os
from presage.kernels.cpu.environment import prepare_environment
assert prepare_environment()
print(os.environ.get("GOMP_SPINCOUNT"))
import torch
assert not prepare_environment()
"""


@pytest.mark.parametrize(("given", "expected"), [({}, "20000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")])
def test_prepare_environment_respects_the_user(given: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


LIMITED = """
import os
os.environ["OMP_THREAD_LIMIT"] = "1"
import numpy as np
from presage.kernels.cpu.team import ParkedPool, Team
assert isinstance(Team(2)._pool, ParkedPool)
"""


def test_a_thread_limit_falls_back_to_own_threads() -> None:
    if openmp_library() is None:
        pytest.skip("no OpenMP runtime in this process")
    subprocess.run([sys.executable, "-c", LIMITED], check=True, capture_output=True)
