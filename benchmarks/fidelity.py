"""The simulator against the engine it simulates: a fit of one profile, then other runs, predicted.

    python benchmarks/fidelity.py [MODEL] [--quantization SCHEME] [--profile-seconds 20] [--requests 60] [--load 0.7] [--save FIT.json]

1. one batch of requests runs three times, with the same steps each time: the machine's own spread from run to run; 2. requests arrive at
``--load`` of that batch's rate (Poisson); 3. a profile of ``--profile-seconds``, half of it taken before and half after the others (the speed
of a shared machine drifts), is fitted, and predicts steps of 1 and, from arrivals alone, TTFT and E2E of 2. Also simulates run 2 with its
measured times and compares all plans.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from presage.core.request import Request
from presage.engine.llm import LLM
from presage.simulate.fidelity import request_errors, spread, step_errors
from presage.simulate.latency.fitted import Fitted, fit, steps_of_log
from presage.simulate.record import greedy, profile, run_open, run_together
from presage.simulate.rerun import rerun


def work(n: int, vocab: int, length: int, seed: int) -> list[Request]:
    """Requests of chat-like lengths (log-normal), scaled to the context."""
    rng = np.random.default_rng(seed)
    n_in = np.clip(rng.lognormal(np.log(length / 8), 0.8, n), 4, length // 2).astype(int)
    n_out = np.clip(rng.lognormal(np.log(length / 10), 0.6, n), 2, length // 3).astype(int)
    return [greedy(f"q{seed}-{i}", rng.integers(0, vocab, a), b) for i, (a, b) in enumerate(zip(n_in.tolist(), n_out.tolist()))]


def build(args: argparse.Namespace, folder: Path) -> LLM:
    """An engine that logs into ``folder``."""
    return LLM(
        args.model, quantization=args.quantization, decision_log=str(folder), decision_log_level="tokens", max_num_seqs=args.seqs,
        max_num_batched_tokens=args.tokens, max_model_len=args.length, enable_prefix_caching=False, kv_cache_memory=args.kv_bytes,
    )  # fmt: skip


def run(args: argparse.Namespace, folder: Path, what: Any) -> float:
    """``what(engine)`` in an engine of its own; seconds it took."""
    llm = build(args, folder)
    began = time.monotonic()
    what(llm.engine)
    seconds = time.monotonic() - began
    llm.close()
    return seconds


def main() -> None:
    """Measure, fit, compare, print."""
    p = argparse.ArgumentParser()
    p.add_argument("model", nargs="?", default="presage-tiny")
    p.add_argument("--quantization", default=None)
    p.add_argument("--profile-seconds", type=float, default=20.0)
    p.add_argument("--requests", type=int, default=60)
    p.add_argument("--load", type=float, default=0.7)
    p.add_argument("--seqs", type=int, default=16)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--kv-bytes", type=int, default=256 << 20)
    p.add_argument("--save", default=None)
    p.add_argument("--machine", default=platform.processor() or platform.machine())
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = compare(args, Path(root))
    print(json.dumps(found))


def compare(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All figures; see the module."""
    profiles = [root / "before", root / "after"]
    vocab = profiled(args, profiles[0])
    batch, folders = work(args.requests, vocab, args.length, 1), [root / f"batch{i}" for i in range(3)]
    seconds = [run(args, f, lambda e: run_together(e, batch)) for f in folders]
    rate, rng = args.load * args.requests / min(seconds), np.random.default_rng(2)
    times = np.cumsum(rng.exponential(1 / rate, args.requests)).tolist()
    arriving = [greedy(r.id, r.prompt, r.sampling.max_tokens or 1, at) for r, at in zip(work(args.requests, vocab, args.length, 2), times)]
    run(args, root / "open", lambda e: run_open(e, arriving))
    profiled(args, profiles[1])
    fitted = fit(*(np.concatenate(part) for part in zip(*map(steps_of_log, profiles))), about={"model": args.model, "machine": args.machine})
    if args.save:
        fitted.save(args.save)
    return figures(fitted, folders, root / "open", rate)


def profiled(args: argparse.Namespace, folder: Path) -> int:
    """Half of the profile; returns the size of the vocabulary."""
    llm = build(args, folder)
    profile(llm.engine, args.profile_seconds / 2)
    llm.close()
    return int(llm.engine.info.vocab_size)


def figures(fitted: Fitted, folders: list[Path], arriving: Path, rate: float) -> dict[str, Any]:
    """Errors of a fit, printed and as data."""
    print("fit       ", {k: round(v, 4) if isinstance(v, float) else v for k, v in fitted.about.items()})
    own, errors = spread(folders), step_errors(fitted, folders)
    print(f"steps      spread from run to run: median {own['median']:.1%}, p95 {own['p95']:.1%}")
    above = {k: errors[k] - own[k] for k in own}
    print(f"           predicted: median {errors['median']:.1%}, p95 {errors['p95']:.1%}, bias {errors['bias']:+.1%}; ", end="")
    print(f"above the spread: median {above['median']:+.1%}, p95 {above['p95']:+.1%}")
    requests = request_errors(arriving, fitted)
    for name, e in requests.items():
        print(f"{name:10} at {rate:.1f} requests/s: " + ", ".join(f"{k} {v:+.1%}" for k, v in e.items()))
    plans = rerun(arriving)
    print(f"plans      {plans} equal to the byte with measured times injected")
    return {"fit": fitted.about, "spread": own, "steps": errors, "requests": requests, "rate": rate, "plans": plans}


if __name__ == "__main__":
    main()
