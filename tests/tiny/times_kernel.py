"""A kernel with a subroutine that differs by a constant, for the tests of the kernels' disk cache."""

from __future__ import annotations

import ctypes
from typing import Any

from presage.kernels.cpu.cache import kernel, subroutine
from presage.kernels.cpu.region import HEADER, enter
from presage.kernels.cpu.simd import get_i64, outlined, set_i64
from presage.kernels.cpu.team import Table


@kernel
def times(factor: int) -> Any:
    """word 0 = factor * word 1."""

    @subroutine
    def multiplied(value):  # type: ignore[no-untyped-def]
        outlined()
        return factor * value

    def run(table):  # type: ignore[no-untyped-def]
        enter(table)
        set_i64(table, HEADER, multiplied(get_i64(table, HEADER + 1)))

    return run


def run_times(factor: int) -> int:
    """10 times the factor, by way of the kernel."""
    table = Table(2, 1)
    table.set(0, 10)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(times(factor).address)(table.address)
    return int(table.words[HEADER])
