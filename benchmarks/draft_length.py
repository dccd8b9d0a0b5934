"""The load-adaptive draft length against every fixed one, on a real engine: recorded outputs, so many at a time.

    python benchmarks/draft_length.py MODEL --data SHARED_DATA [--quantization w8a8] [--loads 1 8 32] [--fixed 0 2 4 8 16] [--rounds 3]
        [--config '{"method": "suffix", "tree": true}'] [--json FILE]

One engine; between runs its length policy is exchanged, and its drafter for a fresh one that reads the same history. ``marginal`` is one policy
for all runs, as in a server that has been up for a while. All policies of a round run the same requests: a mixture of the workloads of
speculation.py, a new request as soon as one ends. Prompts are cached by the first run of a load, which is not counted. Prints tokens/s of
decoding per policy and load, and ``marginal`` against the best fixed length *at that load*: the median of the rounds' ratios, with spread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from speculation import WORKLOADS, Engine

Row = tuple[list[int], list[int]]
OURS = "marginal"


def rows_of(args: argparse.Namespace, count: int) -> tuple[list[list[int]], list[Row]]:
    """(outputs the drafter knows, requests), the workloads in turn."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizers" / "tinyllama" / "tokenizer.json"))
    kinds = []
    for name in args.workloads:
        texts = islice(WORKLOADS[name](args.data), args.history + 2 * count)
        pairs = [(tokenizer.encode(p).ids[-args.prompt :], tokenizer.encode(o).ids[: args.output]) for p, o in texts]
        kinds.append([(p, o) for p, o in pairs if p and len(o) >= 8])
    history = [o for rows in kinds for _, o in rows[: args.history]]
    turns = zip_longest(*(rows[args.history :] for rows in kinds))
    return history, list(islice((row for turn in turns for row in turn if row is not None), count))


def exchange(engine: Engine, config: dict[str, Any], length: Any, history: list[list[int]]) -> None:
    """A fresh drafter that knows ``history``, and a length policy, in an engine that has nothing to do."""
    from presage.draft.registry import make_drafter

    loop = engine.engine.loop
    settings = {k: v for k, v in config.items() if k != "method"}
    new = make_drafter(config["method"], settings, vocab_size=engine.engine.info.vocab_size)
    loop.companions = tuple(new if c is loop.drafter else c for c in loop.companions)
    loop.drafter = new
    loop.length = length
    engine.remember(history)


def run(engine: Engine, rows: list[Row], load: int, name: str) -> tuple[float, float]:
    """(tokens/s, tokens per decoding step of a request) of a closed loop of ``load`` requests. Time before the first token of the first is out."""
    from presage.bench.forced import FORCED
    from presage.core.request import Request
    from presage.core.sampling_params import SamplingParams

    waiting = [
        Request(id=f"{name}-{i}", prompt=np.array(p, np.int32), extras={FORCED: o},
                sampling=SamplingParams(max_tokens=len(o), ignore_eos=True, temperature=0.0))
        for i, (p, o) in enumerate(rows)
    ]  # fmt: skip
    engine.marks, engine.left = {r.id: [] for r in waiting}, len(waiting)
    before, open_ = engine.counts(), 0
    began = time.perf_counter()
    while engine.left:
        for _ in range(min(load - (open_ - (len(rows) - engine.left)), len(rows) - open_)):
            engine.engine.add(waiting[open_])
            open_ += 1
        engine.engine.driver.step()
    seconds = time.perf_counter() - began
    _, tokens, _, accepted = (b - a for a, b in zip(before, engine.counts(), strict=True))
    return tokens / seconds, tokens / max(1.0, tokens - accepted)


def measure(args: argparse.Namespace, engine: Engine, load: int, lengths: dict[Any, Any]) -> dict[str, Any]:
    """One load's figures. ``lengths``: the policies."""
    history, rows = rows_of(args, max(args.least, args.per_load * load))
    policies: list[Any] = [OURS, *args.fixed]
    speeds: dict[str, list[float]] = {str(p): [] for p in policies}
    steps: dict[str, float] = {}
    for i in range(-1, args.rounds):
        for p in policies if i % 2 == 0 else policies[::-1]:
            if i < 0 and p != OURS:
                continue
            exchange(engine, args.config, lengths[p], history)
            speed, per_step = run(engine, rows, load, f"{load}-{p}-{i}")
            if i >= 0:
                speeds[str(p)].append(speed)
                steps[str(p)] = per_step
        print(f"  load {load}, round {i}: " + ", ".join(f"{p} {v[-1]:.1f}" for p, v in speeds.items() if v), flush=True)
    best = max((str(k) for k in args.fixed), key=lambda k: statistics.median(speeds[k]))
    ratios = [a / b for a, b in zip(speeds[OURS], speeds[best], strict=True)]
    return {"load": load, "requests": len(rows), "speeds": speeds, "tokens_per_step": steps, "best": best, "ratios": ratios}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quantization", default="w8a8")
    parser.add_argument("--workloads", nargs="+", default=["agent", "tau", "sql", "code", "math"], choices=list(WORKLOADS))
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--fixed", type=int, nargs="+", default=[0, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=int, default=5, help="requests of a run at the smallest loads")
    parser.add_argument("--per-load", type=float, default=2, help="requests of a run per concurrent request")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--history", type=int, default=100)
    parser.add_argument("--config", type=json.loads, default={"method": "suffix", "tree": True})
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.per_load = int(args.per_load)

    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    from presage.draft.length import make_length

    engine = Engine(args.model, None if args.quantization == "bf16" else args.quantization, args.config, max(args.loads))
    lengths = {OURS: engine.engine.loop.length, **{k: make_length("fixed", num_speculative_tokens=k) for k in args.fixed}}
    found = [measure(args, engine, load, lengths) for load in args.loads]
    print(f"\n{time.strftime('%Y-%m-%d')} {platform.processor() or platform.machine()}, {args.quantization}, {json.dumps(args.config)}, "
          f"medians of {args.rounds} rounds, tokens/s")  # fmt: skip
    print("| at a time | " + " | ".join([OURS, *(f"fixed {k}" for k in args.fixed)]) + f" | {OURS} against the best fixed |")
    print("|---" * (len(args.fixed) + 3) + "|")
    for r in found:
        speeds = [statistics.median(v) for v in r["speeds"].values()]
        print(f"| {r['load']} | " + " | ".join(f"{v:.1f}" for v in speeds)
              + f" | {statistics.median(r['ratios']):.2f}x ({min(r['ratios']):.2f}..{max(r['ratios']):.2f}) of {r['best']} |")  # fmt: skip
    over = {str(k): np.exp(np.mean([np.log(statistics.median(r["speeds"][OURS]) / statistics.median(r["speeds"][str(k)])) for r in found]))
            for k in args.fixed}  # fmt: skip
    print(f"{OURS} over any single fixed length, geometric mean of the loads: " + ", ".join(f"{k}: {v:.2f}x" for k, v in over.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
