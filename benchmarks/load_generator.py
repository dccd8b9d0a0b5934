"""The load generator's own error in arrival times, against a server that computes nothing in another process.

    python benchmarks/load_generator.py [--rate 200] [--seconds 20] [--tokens 16] [--runs 3] [--realtime] [--json FILE]

Two errors are printed, in milliseconds: what the generator says of itself (bytes handed to the kernel less the schedule, the validity gate
of every run) and what the server saw (arrival there less the schedule, on the clock both share). Beside them the machine's floor: how late
a process that does nothing but sleep is woken at the same rate. Poisson arrivals, 512-token prompts as ids, streamed answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from presage.bench.arrivals import arrival_times
from presage.bench.load import Generator, Job, Limits
from presage.bench.null_server import Behaviour, NullServer, null_server
from presage.bench.pace import realtime
from presage.bench.wire import Pool


def floor(at: np.ndarray, fast: bool) -> list[float]:
    """Seconds by which a sleeping process is late at the same moments."""
    late = []
    with realtime(fast):
        start = time.monotonic() + 0.05
        for t in at.tolist():
            time.sleep(max(0.0, start + t - time.monotonic()))
            late.append(time.monotonic() - start - t)
    return late


def measure(server: NullServer, at: np.ndarray, prompt: int, fast: bool) -> dict[str, Any]:
    """One run: errors by the generator and by the server, failures, the client's share of a core."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 4000, (len(at), prompt)).tolist()

    def body(ids: list[int]) -> bytes:
        return json.dumps({"model": "null", "prompt": ids, "max_tokens": 16, "stream": True}).encode()

    jobs = [Job(lambda history, ids=ids: body(ids), t) for ids, t in zip(prompts, at.tolist())]  # type: ignore[misc]
    run = asyncio.run(Generator(Pool(f"{server.url}/v1/completions"), jobs, limits=Limits(realtime=fast)).run())
    due = np.sort([r.t_sched for r in run.records])
    seen = np.sort(server.arrivals())
    return {
        "own": [r.send_error for r in run.records],
        "seen": (seen - due[: len(seen)]).tolist(),
        "failed": sum(not r.ok for r in run.records),
        "cpu_share": run.cpu_share,
        "realtime": run.realtime,
    }


def words(values: Sequence[float]) -> str:
    """Median, p99 and maximum in milliseconds."""
    p50, p99, most = (1e3 * float(np.percentile(values, p)) for p in (50, 99, 100))
    return f"p50 {p50:7.3f}  p99 {p99:7.3f}  max {most:8.3f}"


def main() -> None:
    """Run and print."""
    p = argparse.ArgumentParser()
    p.add_argument("--rate", type=float, default=200.0)
    p.add_argument("--seconds", type=float, default=20.0)
    p.add_argument("--tokens", type=int, default=16)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--realtime", action="store_true")
    p.add_argument("--json")
    args = p.parse_args()
    n, found = int(args.rate * args.seconds), []
    print(f"{args.rate:g} requests/s for {args.seconds:g} s, {args.runs} runs; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ms")
    with null_server(Behaviour(tokens=args.tokens), args.realtime) as server:
        for seed in range(args.runs):
            at = arrival_times(n, args.rate, 1.0, seed)
            got = {"floor": floor(at[: n // 4], args.realtime), **measure(server, at, args.prompt, args.realtime)}
            for name in ("floor", "own", "seen"):
                print(f"run {seed} {name:6} {words(got[name])}")
            verdict = "valid" if np.percentile(got["own"], 99) <= 0.005 and not got["failed"] else "INVALID"
            print(f"run {seed} {verdict}; failed {got['failed']}, client CPU {got['cpu_share']:.0%} of a core, realtime {got['realtime']}")
            found.append({**got, **{k: {f"p{q}": float(np.percentile(got[k], q)) for q in (50, 99, 100)} for k in ("floor", "own", "seen")}})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rate": args.rate, "load": os.getloadavg()[0], "runs": found}, file)


if __name__ == "__main__":
    main()
