"""The load-adaptive draft length against every fixed one, from 1 to 64 requests at a time, in the simulator fitted to a real engine.

    presage profile fit MODEL --quantization w8a8 --output fit.json
    python benchmarks/draft_length_simulated.py fit.json --model MODEL --data SHARED_DATA [--loads 1 2 4 8 16 32 64] [--fixed 0 1 2 4 8 16]
        [--config '{"method": "suffix", "suffix_decoding_tree": true}'] [--drafting-ms 0.1]

The engine's loop, suffix trees and length policies on a virtual clock; recorded outputs say what comes true, the fit what a step takes. Requests
are those of ``draft_length.py``, which checks three loads on the engine itself. ``marginal`` is one policy for all loads, as in a server
that has been up for a while; it learns step times and acceptance from what it sees. Prints tokens/s.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from draft_length import OURS, rows_of
from speculation import WORKLOADS, teach

from presage.core.config import EngineConfig
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.draft.length import make_length
from presage.draft.length.steptime import StepTime
from presage.draft.registry import make_drafter
from presage.simulate.run import simulate
from presage.simulate.speculation import Drafting
from presage.simulate.targets import make_target, shape_of

Row = tuple[list[int], list[int]]


class Server:
    """Policies that outlive a run. ``history``: outputs that every drafter knows."""

    def __init__(self, args: argparse.Namespace, history: list[list[int]]) -> None:
        self.args, self.step_time = args, StepTime()
        self.lengths: dict[Any, Any] = {OURS: make_length(OURS), **{k: make_length("fixed", num_speculative_tokens=k) for k in args.fixed}}
        self.history = history

    def drafter(self) -> Any:
        """A fresh one that has read the history."""
        settings = {k: v for k, v in self.args.config.items() if k != "method"}
        made: Any = make_drafter(self.args.config["method"], settings, vocab_size=32000)
        teach(made, self.history)
        return made

    def run(self, length: Any, load: int, rows: list[Row]) -> float:
        """Tokens/s of a closed loop of ``load`` requests."""
        work = [self._request(i, row) for i, row in enumerate(rows)]
        waiting = iter(work[load:])

        def after(ended: Request, now: float) -> Iterable[Request]:
            for request in waiting:
                return [msgspec.structs.replace(request, arrival=now)]
            return []

        config = EngineConfig.of(max_num_seqs=load, max_num_batched_tokens=512, enable_prefix_caching=False)
        target = make_target(config, shape_of(self.args.model), "h100", latency=str(self.args.fit), max_model_len=4096)
        target = replace(target, latency=Drafting(target.latency, self.args.drafting_ms / 1e3))
        policy = self.lengths[length]
        found = simulate(
            config, work[:load], target, after=after, max_drafts=config.speculation.max_draft_tokens, drafter=self.drafter,
            length=lambda: policy, latency=lambda: self.step_time, companions=lambda: (policy.wishes,),
        )  # fmt: skip
        r = found.requests
        return float(r["n_out"].sum() / (r["done"].max() - r["arrival"].min()))

    def _request(self, i: int, row: Row) -> Request:
        params = SamplingParams(max_tokens=len(row[1]), ignore_eos=True, temperature=0.0)
        return Request(id=f"r{i}", prompt=np.array(row[0], np.int32), sampling=params, arrival=0.0, extras={"reply": row[1]})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fit", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+", default=["agent", "tau", "sql", "code", "math"], choices=list(WORKLOADS))
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--fixed", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--per-load", type=int, default=6, help="requests per concurrent one")
    parser.add_argument("--least", type=int, default=40, help="requests at the smallest loads")
    parser.add_argument("--prompt", type=int, default=192)
    parser.add_argument("--output", type=int, default=96)
    parser.add_argument("--history", type=int, default=100)
    parser.add_argument("--drafting-ms", type=float, default=0.1, help="what drafting adds to a step with drafts")
    parser.add_argument("--config", type=json.loads, default={"method": "suffix", "num_speculative_tokens": 16, "suffix_decoding_tree": True})
    args = parser.parse_args()
    history, rows = rows_of(args, max(args.least, args.per_load * max(args.loads)))
    server = Server(args, history)
    server.run(OURS, args.loads[0], rows[: args.least])  # it has been up for a while
    about = json.loads(args.fit.read_text())["about"]
    fitted = f"fit of {about['quantization'] or about['dtype']} ({about['steps']} steps, median error {about['median']:.1%})"
    print(f"{time.strftime('%Y-%m-%d')}, {fitted}, {json.dumps(args.config)}; tokens/s")
    print("| at a time | " + " | ".join([OURS, *(f"fixed {k}" for k in args.fixed)]) + f" | {OURS} against the best fixed |")
    print("|---" * (len(args.fixed) + 3) + "|")
    speeds: dict[Any, list[float]] = {p: [] for p in [OURS, *args.fixed]}
    for load in args.loads:
        part = rows[: max(args.least, args.per_load * load)]
        for p, found in speeds.items():
            found.append(server.run(p, load, part))
        best = max(args.fixed, key=lambda k: speeds[k][-1])
        shown = " | ".join(f"{v[-1]:.1f}" for v in speeds.values())
        print(f"| {load} | {shown} | {speeds[OURS][-1] / speeds[best][-1]:.2f}x of {best} |", flush=True)
    over = {k: float(np.exp(np.mean(np.log(np.array(speeds[OURS]) / speeds[k])))) for k in args.fixed}
    print(f"{OURS} over any single fixed length, geometric mean of the loads: " + ", ".join(f"{k}: {v:.2f}x" for k, v in over.items()))


if __name__ == "__main__":
    main()
