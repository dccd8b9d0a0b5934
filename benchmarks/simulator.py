"""Simulated requests per second of this machine: the Azure conversation trace at 5 times its rate through one engine.

    python benchmarks/simulator.py [--rate 5] [--requests 19366] [--tokens 2048] [--seqs 256] [--tp 1] [--no-bursts] [--profile]
    python benchmarks/simulator.py --fleet [--requests 1000000] [--replicas 64]

Prints requests/s (of wall and of CPU time), turns and steps per request. The trace knows only lengths, so no prefix repeats and caching is
off by default. ``--fleet``: lengths drawn from the trace, Poisson arrivals at the trace's rate times ``--rate`` per replica, no timeline kept.
Needs ../shared/data (or PRESAGE_SHARED). See also fidelity.py and predict_vllm.py.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import time
from pathlib import Path

import numpy as np

from presage.bench.workloads import Requests, Workload, read_azure, replayed
from presage.core.config import EngineConfig
from presage.simulate.run import Result, Target, simulate
from presage.simulate.targets import make_target, shape_of

DATA = Path(os.environ.get("PRESAGE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


def trace(args: argparse.Namespace) -> Workload:
    """The recording, or (fleets) lengths drawn from it and Poisson arrivals."""
    found = read_azure(DATA)
    if not args.fleet:
        return replayed(found, args.rate).first(args.requests)
    rng = np.random.default_rng(0)
    rows, rate = rng.integers(0, len(found), args.requests), found.rate * args.rate * args.replicas
    return Workload("fleet", np.cumsum(rng.exponential(1 / rate, args.requests)), found.n_in[rows], found.n_out[rows])


def main() -> None:
    """Run and print."""
    p = argparse.ArgumentParser()
    p.add_argument("--rate", type=float, default=5.0)
    p.add_argument("--requests", type=int, default=19366)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--seqs", type=int, default=256)
    p.add_argument("--replicas", type=int, default=1)
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--hardware", default="h100")
    p.add_argument("--policy", default="fcfs")
    p.add_argument("--model", default="meta-llama--Meta-Llama-3.1-8B_config.json")
    for flag in ("--fleet", "--no-bursts", "--prefix-caching", "--profile"):
        p.add_argument(flag, action="store_true")
    args = p.parse_args()
    config = EngineConfig.of(
        max_num_batched_tokens=args.tokens, max_num_seqs=args.seqs, max_waiting=1 << 20, scheduling_policy=args.policy,
        enable_prefix_caching=args.prefix_caching,
    )  # fmt: skip
    target = make_target(config, shape_of(DATA / "model_configs" / args.model), args.hardware, tp=args.tp, max_model_len=16384)
    work = trace(args)
    simulate(config, Requests(work.first(50)), target)
    run(args, config, target, work)


def run(args: argparse.Namespace, config: EngineConfig, target: Target, work: Workload) -> None:
    """Simulate it, perhaps under a profiler."""
    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
    began = time.process_time()
    result = simulate(
        config, Requests(work), target, replicas=args.replicas, bursts=not args.no_bursts, progress=True, timeline=not args.fleet
    )  # fmt: skip
    cpu = time.process_time() - began
    if args.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    report(result, cpu)
    if args.fleet:
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def report(r: Result, cpu: float) -> None:
    """The figures on one line each, and as JSON."""
    n = len(r.ids)
    ttft, tpot = r.ttft, r.tpot
    figures = {
        "requests_per_second": round(r.requests_per_second, 1),
        "requests_per_cpu_second": round(n / cpu, 1),
        "wall_s": round(r.wall, 2),
        "turns_per_request": round(r.turns / n, 2),
        "steps_per_request": round(r.n_steps / n, 2),
        "cpu_us_per_turn": round(1e6 * cpu / r.turns, 1),
        "virtual_s": round(r.duration, 1),
        "busy_share": round(r.busy / r.duration / r.replicas, 3),
        "kwh": round(r.joules / 3.6e6, 2),
        "failed": int(n - r.ok.sum()),
        "median_ttft_s": round(float(np.median(ttft)), 3),
        "median_tpot_ms": round(1e3 * float(np.nanmedian(tpot)), 2),
    }
    for key, value in figures.items():
        print(f"{key:22} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
