"""What judging costs per step: processor time of ``Sampler.judge`` by number of rows and by sampling parameters.

    python benchmarks/sampling.py [--vocab 32768] [--scale 3]

``--scale`` is the spread of the random logits: 1 is flatter than a language model's, 3 about as peaked. Times are the least of several runs
of the calling thread's processor time, so that a busy machine does not blur them; judging opens no parallel region.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.execute.sampling import Sampler
from presage.verify.kit import draft_of, plan_of

KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k 50": {"temperature": 0.7, "top_k": 50},
    "top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.7, "min_p": 0.05},
    "everything": {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def least(call: Callable[[], object], runs: int) -> float:
    """Least processor time of one call, in microseconds."""
    best = float("inf")
    for _ in range(runs):
        t = time.thread_time()
        call()
        best = min(best, time.thread_time() - t)
    return best * 1e6


def case(kind: dict[str, object], rows: int, drafts: int, vocab: int, scale: float) -> Callable[[], object]:
    """A step of ``rows`` requests, each with a chain of ``drafts`` wrong drafts."""
    rng = np.random.default_rng(0)
    sampler = Sampler(vocab)
    for slot in range(rows):
        prompt = rng.integers(0, vocab, 300).astype(np.int32)
        sampler.open(slot, Request(id=str(slot), prompt=prompt, sampling=SamplingParams(max_tokens=16, **kind)))
    plan = plan_of(list(range(rows)), [300] * rows, draft_of([[(i, i - 1) for i in range(drafts)]] * rows))
    logits = torch.from_numpy((rng.standard_normal((rows * (drafts + 1), vocab)) * scale).astype(np.float32))
    span = np.repeat(np.arange(rows), drafts + 1).astype(np.int32)
    node = np.tile(np.arange(-1, drafts), rows).astype(np.int32)
    return lambda: sampler.judge(logits, plan, span, node)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(1, 0), (16, 0), (16, 4)]
    print(f"microseconds per step, vocabulary {args.vocab}, logits of spread {args.scale}")
    print(f"{'':20}" + "".join(f"{f'{n} rows' + (f' + {d} drafts each' if d else ''):>28}" for n, d in columns))
    for name, kind in KINDS.items():
        cells = [least(case(kind, n, d, args.vocab, args.scale), args.runs) for n, d in columns]
        print(f"{name:20}" + "".join(f"{c:28.0f}" for c in cells))


if __name__ == "__main__":
    main()
