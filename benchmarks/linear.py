"""Speed of the packed linear beside what the machine allows: plain memory reading and oneDNN with prepacked weights.

    python benchmarks/linear.py [--threads 2] [--n 8192 --k 2048] [--copies 16] [--rows 1,8,16,64,512] [--format bf16]

``--format``: bf16, f32, or a quantisation scheme (w8a8, w4a8, w4a8-g64-z, w4a16, bf16x12, ...); GFLOP/s are then integer operations.
Several copies of the weight are used in turn, so that each call streams from memory. Everything is measured within the same minute; the
machine may be shared, so read ratios (or use --threads 1 --cpu-time). The last column: time over that of one row.
"""

from __future__ import annotations

from presage.kernels.cpu.environment import prepare_environment

prepare_environment()

import argparse  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402

from presage.kernels.cpu.linear import linear  # noqa: E402
from presage.kernels.cpu.memory import Arena  # noqa: E402
from presage.kernels.cpu.pack import PackedLinear, pack  # noqa: E402
from presage.kernels.cpu.team import Team  # noqa: E402
from presage.layers.ops_cpu import pack_planned  # noqa: E402
from presage.quantize.planned import Planned  # noqa: E402
from presage.quantize.schemes import parse_scheme  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def best_of(call: Callable[[], object], rounds: int, clock: Callable[[], float]) -> float:
    """Shortest time of a call in seconds: the disturbances of a shared machine only ever add."""
    times = []
    for _ in range(rounds):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def read_bandwidth(threads: int, rounds: int, clock: Callable[[], float]) -> float:
    """Bytes per second of a parallel sum over memory much larger than the caches."""
    buffer = torch.ones(128 << 20, dtype=torch.float32)
    torch.set_num_threads(threads)
    seconds = best_of(buffer.sum, rounds, clock)
    torch.set_num_threads(1)
    return buffer.nbytes / seconds


def own(team: Team, packs: list[PackedLinear], x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    """One pass of our kernel over all copies."""

    def run() -> None:
        for p in packs:
            linear(team, x, p, out)

    return run


def packed(weight: torch.Tensor, form: str, team: Team) -> PackedLinear:
    """A weight in a dense format or a scheme's."""
    return pack(weight, form, team) if form in DTYPES else pack_planned([Planned((weight,), parse_scheme(form))], team)


def onednn(weights: list[torch.Tensor], x: torch.Tensor, threads: int) -> Callable[[], None]:
    """One pass of oneDNN over all copies, packed for this number of rows."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for w in weights]

    def run() -> None:
        torch.set_num_threads(threads)
        for w in packed:
            torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        torch.set_num_threads(1)

    return run


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("n", 8192), ("k", 2048), ("copies", 16), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 16, 64, 512])
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--no-onednn", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time instead of wall time; only with one thread")
    return parser.parse_args()


def main() -> None:
    """Print one line per number of rows."""
    options = arguments()
    clock = time.thread_time if options.cpu_time and options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(1)
    team, dtype, arena = Team(options.threads), DTYPES.get(options.format, torch.bfloat16), Arena()
    weights = [torch.randn(options.n, options.k).to(dtype) for _ in range(options.copies)]
    start = time.perf_counter()
    packs = [arena.settle(packed(w, options.format, team)) for w in weights]
    seconds = time.perf_counter() - start
    nbytes, operations = sum(p.nbytes for p in packs), 2 * options.n * options.k * options.copies
    print(f"{packs[0]!r} x {options.copies}, {options.threads} threads; packed at {nbytes / seconds / 1e9:.1f} GB/s")
    print(f"plain read {read_bandwidth(options.threads, options.rounds, clock) / 1e9:.1f} GB/s")
    single = 0.0
    for rows in options.rows:
        x, out = torch.randn(rows, options.k).to(dtype), torch.empty(rows, options.n)
        rounds = options.rounds if rows < 256 else max(2, options.rounds // 3)
        runs = {"own": own(team, packs, x, out)}
        if not options.no_onednn and options.format in DTYPES:
            runs["oneDNN"] = onednn(weights, x, options.threads)
        for name, run in runs.items():
            run()
            took = best_of(run, rounds, clock)
            single = single or took
            print(
                f"{rows:4d} rows {name:7s} {took / options.copies * 1e3:8.3f} ms  {nbytes / took / 1e9:6.1f} GB/s"
                f"  {operations * rows / took / 1e9:7.1f} GFLOP/s  {took / single:5.2f}x"
            )
    print(f"plain read {read_bandwidth(options.threads, options.rounds, clock) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
