"""Presage beside vLLM on this CPU: both engines loaded, asked in turns, medians of paired ratios, plain read bandwidth in the same minute.

    python benchmarks/peers.py MODEL --vllm-python PATH/TO/vllm-venv/bin/python [--pairs 5]

MODEL is a bf16 checkpoint folder (random weights do). Decode rates take two output lengths and divide the difference, so that nobody's
prefill counts. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CASES = (
    ("decode, batch 1", 1, 32, (16, 80)),
    ("decode, batch 4", 4, 32, (16, 80)),
    ("decode, batch 16", 16, 32, (16, 80)),
    ("prefill 1024", 1, 1024, ()),
)


def prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    """Random ids, new each time, so that no prefix cache helps."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 31999, length).tolist() for _ in range(batch)]


def presage_run(model: str) -> Callable[[int, int, int, int], float]:
    """A function that times one batch on our engine."""
    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    from presage import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=2048, max_num_seqs=32, kv_cache_memory="4GiB", max_num_batched_tokens=512)

    def run(batch: int, length: int, tokens: int, seed: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = prompts(batch, length, seed)
        began = time.perf_counter()
        llm.generate(ids, params)
        return time.perf_counter() - began

    return run


def vllm_run(model: str) -> Callable[[int, int, int, int], float]:
    """The same on vLLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048, max_num_seqs=32)

    def run(batch: int, length: int, tokens: int, seed: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = [TokensPrompt(prompt_token_ids=p) for p in prompts(batch, length, seed)]
        began = time.perf_counter()
        llm.generate(ids, params, use_tqdm=False)
        return time.perf_counter() - began

    return run


def read_bandwidth() -> float:
    """GB/s of summing 1 GiB with all cores, best of five."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    x = torch.ones(1 << 28, dtype=torch.float32)
    best = min(_timed(x.sum) for _ in range(5))
    return x.nbytes / best / 1e9


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def worker(engine: str, model: str) -> None:
    """Answer timing requests from standard input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to stderr
    if engine == "read":
        print(json.dumps(read_bandwidth()), file=out, flush=True)
        return
    run = presage_run(model) if engine == "presage" else vllm_run(model)
    for i in range(2):
        run(1, 32, 8, 1000 + i)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), file=out, flush=True)


class Peer:
    """An engine in its own process."""

    def __init__(self, python: str, engine: str, model: str) -> None:
        command = [python, __file__, model, "--worker", engine]
        env = os.environ | ({} if engine != "vllm" else {"PYTHONPATH": ""})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        if self.out.readline().strip() != "ready":
            raise SystemExit(f"{engine} did not start")

    def ask(self, *what: int) -> float:
        """Seconds of one batch."""
        self.into.write(json.dumps(what) + "\n")
        self.into.flush()
        return float(self.out.readline())


def measure(peer: Peer, case: tuple[str, int, int, tuple[int, ...]], seed: int) -> float:
    """Tokens per second of a case."""
    _, batch, length, lengths = case
    if not lengths:
        return batch * length / peer.ask(batch, length, 1, seed)
    short, long = lengths
    return batch * (long - short) / (peer.ask(batch, length, long, seed) - peer.ask(batch, length, short, seed + 1))


def main() -> None:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--vllm-python")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.model)
    ours = Peer(sys.executable, "presage", args.model)
    theirs = Peer(args.vllm_python, "vllm", args.model) if args.vllm_python else None
    size = sum(os.path.getsize(os.path.join(args.model, f)) for f in os.listdir(args.model) if f.endswith(".safetensors"))
    rows = []
    for case in (c for c in CASES if args.only in c[0]):
        pairs, reads = [], []
        for i in range(args.pairs):
            reads.append(float(subprocess.run([sys.executable, __file__, "-", "--worker", "read"], capture_output=True, text=True).stdout))
            a = measure(ours, case, 100 * i)
            pairs.append((a, measure(theirs, case, 100 * i) if theirs else float("nan")))
        ratios = sorted(a / b for a, b in pairs)
        row = {
            "case": case[0],
            "presage": statistics.median(a for a, _ in pairs),
            "vllm": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(ratios),
            "spread": [ratios[0], ratios[-1]],
            "read_gb_s": statistics.median(reads),
        }
        if case[1] == 1 and case[3]:
            row["of_read"] = statistics.median(a * size / 1e9 / r for (a, _), r in zip(pairs, reads))
        rows.append(row)
        extra = f"   {100 * row['of_read']:.0f} % of plain read" if "of_read" in row else ""
        print(
            f"{case[0]:18s} presage {row['presage']:7.1f}  vllm {row['vllm']:7.1f} tok/s   ratio {row['ratio']:.2f} "
            f"({ratios[0]:.2f}..{ratios[-1]:.2f})   read {row['read_gb_s']:.1f} GB/s{extra}",
            flush=True,
        )
    print(json.dumps({"machine": platform.machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}))


if __name__ == "__main__":
    main()
