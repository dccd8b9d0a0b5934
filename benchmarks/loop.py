"""Cost of a turn with a null executor: everything the loop does for one decode step, without emission.

    python benchmarks/loop.py

Budget (contracts): 120 us + 0.6 us per running request. Prints the median over turns at 1, 64 and 256 requests, sync and planned ahead.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.pure.loops import Bench


def measure(requests: int, ahead: bool, turns: int = 400, log: object = None) -> float:
    """Median microseconds per turn while ``requests`` requests decode."""
    bench = Bench(
        blocks=requests * 24 + 64,
        max_num_seqs=requests,
        max_num_batched_tokens=max(512, 2 * requests),
        async_scheduling=ahead,
        max_len=700,
        log=log,
    )
    bench.executor.manual = True
    for i in range(requests):
        bench.add(f"r{i}", [5 + i, 6, 7] * 8, max_tokens=600, ignore_eos=True)
    samples = []
    for turn in range(turns):
        if bench.executor.submitted:
            bench.executor.finish()
        events, bench.executor.events = bench.executor.events, []
        bench.now += 0.001
        start = time.perf_counter()
        bench.loop.turn(bench.now, events)
        took = time.perf_counter() - start
        bench.loop.emitter.flush()
        if turn > 60:
            samples.append(took)
    return statistics.median(samples) * 1e6


def main() -> None:
    """Print the table."""
    rows = []
    for n in (1, 64, 256):
        row = {"requests": n, "sync_us": measure(n, False), "ahead_us": measure(n, True), "budget_us": 120 + 0.6 * n}
        rows.append(row)
        print(
            f"{n:4d} requests   sync {row['sync_us']:7.1f} us   ahead {row['ahead_us']:7.1f} us   budget {row['budget_us']:6.1f} us",
            flush=True,
        )
    print(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
