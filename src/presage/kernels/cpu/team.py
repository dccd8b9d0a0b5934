"""One pool of threads for all kernels: the OpenMP runtime that torch has already mapped.

A second runtime beside torch's would mean two teams spinning against each other, so kernels are started by
`GOMP_parallel` of the libgomp in the process (LLVM's libomp exports the same entry). The team's size is fixed for life and
given with each call, so `torch.set_num_threads(1)`, which keeps torch's own operators from opening regions inside a step,
does not change it. OpenMP keeps one pool per calling thread: run a Team always from the same thread, the executor's.
Where there is no OpenMP runtime, parked Python threads do the same job more slowly.

Between regions the workers spin for a moment and then sleep (`environment.prepare_environment`).
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.cache import Kernel, kernel
from presage.kernels.cpu.region import HEADER, SIZE, enter
from presage.kernels.cpu.simd import atomic_add

RELEASE_BYTES = 4 << 20
"""Above this many bytes (or operations / 16) a kernel takes longer than ~0.2 ms: the GIL is released. Below it, taking the
GIL back may cost up to a switch interval, far more than the kernel."""


class Table:
    """A kernel's parameters: int64 words in memory of their own, `HEADER` words for the region first. Belongs to one call site."""

    def __init__(self, words: int, threads: int) -> None:
        self._memory = torch.zeros(HEADER + words, dtype=torch.int64)
        self.words = self._memory.numpy()
        self.words[SIZE] = threads
        self.address: int = self._memory.data_ptr()
        self._pack = struct.Struct(f"={words}q").pack_into
        self._buffer = memoryview(cast(Any, self.words)).cast("B")

    def set(self, *values: int) -> int:
        """Write all parameters (as many ints as the table has words) and return the table's address."""
        self._pack(self._buffer, 8 * HEADER, *values)
        return self.address


class Pool(Protocol):
    """Starts `threads` copies of `void fn(int64)` and waits for them."""

    def run(self, address: int, table: int, threads: int, release: bool) -> None:
        """Run the callback at `address`; `release` lets other Python threads run meanwhile."""


class OpenMPPool:
    """The OpenMP runtime already in the process."""

    def __init__(self, library: str) -> None:
        arguments: Any = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._holding = ctypes.PyDLL(library).GOMP_parallel
        self._releasing = ctypes.CDLL(library).GOMP_parallel
        for entry in (self._holding, self._releasing):
            entry.argtypes, entry.restype = arguments, None

    def run(self, address: int, table: int, threads: int, release: bool) -> None:
        (self._releasing if release else self._holding)(address, table, threads, 0)


class ParkedPool:
    """Own threads, parked on semaphores: for platforms without an OpenMP runtime. A region costs tens of microseconds."""

    def __init__(self, threads: int) -> None:
        self._job: tuple[Callable[[int], None], int] | None = None
        self._start = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._done = threading.Semaphore(0)
        for semaphore in self._start:
            threading.Thread(target=self._work, args=(semaphore,), name="presage-team", daemon=True).start()

    def _work(self, start: threading.Semaphore) -> None:
        while True:
            start.acquire()
            if self._job is None:
                return
            function, table = self._job
            function(table)
            self._done.release()

    def run(self, address: int, table: int, threads: int, release: bool) -> None:
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
        self._job = (function, table)
        for semaphore in self._start:
            semaphore.release()
        function(table)
        for _ in self._start:
            self._done.acquire()

    def close(self) -> None:
        """End the threads."""
        self._job = None
        for semaphore in self._start:
            semaphore.release()


def openmp_library() -> str | None:
    """Path of the OpenMP runtime torch uses: the one mapped into the process, torch's own copy first."""
    home = str(Path(torch.__file__).parent)
    try:
        paths = {
            line.split(None, 5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if len(line.split(None, 5)) == 6
        }
    except OSError:
        paths = {str(path) for path in Path(home, "lib").glob("lib*omp*")}
    found = [path for path in sorted(paths) if Path(path).name.startswith(("libgomp", "libomp", "libiomp5"))]
    return min(found, key=lambda path: not path.startswith(home), default=None)


@kernel
def _count():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        enter(table)
        atomic_add(table, HEADER, 1)

    return run


class Team:
    """`threads` threads, for the life of the process. Raises ConfigError if `threads` < 1."""

    def __init__(self, threads: int, pool: Pool | None = None) -> None:
        if threads < 1:
            raise ConfigError(f"a team needs at least one thread, not {threads}", param="threads")
        self.threads = threads
        # `generation` counts how often scratch has moved.
        self._pool = pool or self._choose()
        self._start = self._pool.run
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_at = self.scratch_stride = self.generation = 0
        self._shared = torch.empty(0, dtype=torch.uint8)

    def _choose(self) -> Pool:
        library = openmp_library()
        try:
            pool: Pool | None = OpenMPPool(library) if library else None
        except (OSError, AttributeError):
            pool = None
        # A thread limit set by the user gives smaller teams than asked for; ranks and barriers need all of them.
        if pool is not None and self._participants(pool) == self.threads:
            return pool
        return ParkedPool(self.threads)

    def _participants(self, pool: Pool) -> int:
        table = self.table(1)
        pool.run(_count().address, table.address, self.threads, False)
        return int(table.words[HEADER])

    def table(self, words: int) -> Table:
        """A table with room for `words` parameters, for use with this team."""
        return Table(words, self.threads)

    def run(self, function: Kernel | int, table: int, work: int = 0) -> None:
        """Run a kernel on all threads and wait.

        `table`: address of a Table; `work`: bytes touched (or operations / 16), which decides whether the GIL is released.
        """
        address = function if isinstance(function, int) else function.address
        self._start(address, table, self.threads, work > RELEASE_BYTES)

    def scratch(self, nbytes: int) -> int:
        """Address of the region's scratch: `scratch_stride` >= `nbytes` per thread, 64-byte aligned, valid during the next region only.

        It grows when more is asked for and is then kept.
        """
        if self.scratch_stride < nbytes:
            self.scratch_stride = -(-nbytes // 64) * 64
            self._scratch = torch.empty(self.scratch_stride * self.threads, dtype=torch.uint8)
            self._scratch_at = self._scratch.data_ptr()
            self.generation += 1
        return self._scratch_at

    def shared(self, nbytes: int) -> int:
        """Address of scratch that all threads of a region share, 64-byte aligned, valid during the next region only; it grows as `scratch`."""
        if len(self._shared) < nbytes + 64:
            self._shared = torch.empty(nbytes + nbytes // 4 + 64, dtype=torch.uint8)
            self.generation += 1
        return -(-self._shared.data_ptr() // 64) * 64


def warm_kernels() -> list[Kernel]:
    """What making a Team runs."""
    return [_count()]
