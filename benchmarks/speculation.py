"""Speculation end to end: recorded outputs replayed by a real engine, with a drafter and without, in interleaved pairs.

    python benchmarks/speculation.py MODEL --data SHARED_DATA [--quantization w8a8] [--workloads agent tau sql code] [--pairs 7]
        [--rows 2] [--history 100] [--concurrency 1] [--config '{"method": "suffix"}'] [--json FILE]

MODEL: a checkpoint folder (random weights do: the output is forced, the engine's work is real). Each pair replays rows that neither engine saw
before. They are spread evenly over the recording behind its first ``--history`` rows, and the drafter has seen all outputs before them.
The ratio is of decoding time: from a request's first token to its last, summed; ``whole`` includes the prompts. Prints the median of the
ratios with their spread, tokens per step, and drafted per step.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGETS = {"agent": 2.5, "tau": 2.5, "sql": 1.5, "code": 1.5, "math": 0.97}
Rows = Iterator[tuple[str, str]]


def agent(data: Path) -> Rows:
    """Calls of a coding agent."""
    with gzip.open(data / "agent_prompt_logs" / "calls.jsonl.gz", "rt") as file:
        for line in file:
            r = json.loads(line)
            if r["source"] == "miniswe" and r.get("output"):
                yield r["input"], r["output"] if isinstance(r["output"], str) else json.dumps(r["output"])


def tau(data: Path) -> Rows:
    """Turns of an airline's assistant that calls tools."""
    for line in next((data / "tau_bench_trajectories").glob("*.jsonl")).open():
        context = ""
        for m in json.loads(line)["traj"]:
            text = (m.get("content") or "") + (json.dumps(m["tool_calls"]) if m.get("tool_calls") else "")
            if m["role"] == "assistant":
                yield context, text
            context += f"\n{m['role']}: {text}"


def sql(data: Path) -> Rows:
    """Questions to SQL."""
    with (data / "sql_eval" / "questions_gen_postgres.csv").open(newline="") as file:
        for r in csv.DictReader(file):
            yield f"{r['db_name']}: {r['question']}", r["query"]


def code(data: Path) -> Rows:
    """Python functions."""
    for line in next((data / "humaneval").glob("*.jsonl")).open():
        r = json.loads(line)
        yield r["prompt"], r["canonical_solution"]


def math(data: Path) -> Rows:
    """Worked answers to school problems: little to copy, the workload on which speculation must not lose."""
    for line in (data / "gsm8k" / "test.jsonl").open():
        r = json.loads(line)
        yield r["question"], r["answer"]


WORKLOADS = {"agent": agent, "tau": tau, "sql": sql, "code": code, "math": math}


def leaves(drafter: Any) -> list[Any]:
    """A drafter's parts, and theirs."""
    return [leaf for part in drafter.drafters for leaf in leaves(part)] if hasattr(drafter, "drafters") else [drafter]


def teach(drafter: Any, outputs: list[list[int]]) -> int:
    """Past outputs for those parts of a drafter that learn from a file; how many they took."""
    learners = [d for d in leaves(drafter) if hasattr(d, "warm_up")]
    if not outputs or not learners:
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"token_ids": ids}) + "\n" for ids in outputs)
        file.flush()
        return sum(d.warm_up(file.name) for d in learners)


class Engine:
    """One engine and its measurements. ``speculative``: its configuration, None for none."""

    def __init__(self, model: str, quantization: str | None, speculative: dict[str, Any] | None, concurrency: int) -> None:
        from presage.bench.forced import ForcedSampler
        from presage.core.config import EngineConfig
        from presage.engine.build import build_engine

        config = EngineConfig.of(
            model=model, quantization=quantization, speculative_config=speculative, kv_cache_memory="1GiB", max_num_seqs=max(8, concurrency),
            max_model_len=4096, dtype="bfloat16",
        )  # fmt: skip
        self.engine = build_engine(config, self._take, sampler=ForcedSampler)
        self.marks: dict[str, list[float]] = {}
        self.left = 0

    def _take(self, emissions: list[Any]) -> None:
        now = time.perf_counter()
        for e in emissions:
            if e.error is not None:
                raise SystemExit(f"{e.id}: {e.error}")
            if e.ids and e.id in self.marks:
                self.marks[e.id].append(now)
            if e.finish and e.id in self.marks:
                self.left -= 1

    def replay(self, rows: list[tuple[Any, Any]], concurrency: int, name: str) -> tuple[float, float]:
        """(decoding seconds, whole seconds) of the rows, ``concurrency`` at a time."""
        import numpy as np

        from presage.bench.forced import FORCED
        from presage.core.request import Request
        from presage.core.sampling_params import SamplingParams

        began, decoding = time.perf_counter(), 0.0
        for start in range(0, len(rows), concurrency):
            part = rows[start : start + concurrency]
            self.marks, self.left = {f"{name}-{start + i}": [] for i in range(len(part))}, len(part)
            for key, (prompt, output) in zip(self.marks, part, strict=True):
                params = SamplingParams(max_tokens=len(output), ignore_eos=True, temperature=0.0)
                self.engine.add(Request(id=key, prompt=np.array(prompt, np.int32), sampling=params, extras={FORCED: output}))
            while self.left:
                self.engine.driver.step()
            decoding += sum(m[-1] - m[0] for m in self.marks.values()) / len(part)
        return decoding, time.perf_counter() - began

    def remember(self, outputs: list[list[int]]) -> None:
        """Past outputs, as a server would have seen them before."""
        teach(self.engine.loop.drafter, outputs)

    def counts(self) -> tuple[float, float, float, float]:
        """Steps, tokens, drafted, accepted so far."""
        s = self.engine.stats()
        return s["steps"], s["generated_tokens"], s["spec_num_draft_tokens"], s["spec_num_accepted_tokens"]


def measure(args: argparse.Namespace, name: str, plain: Engine, spec: Engine) -> dict[str, Any]:
    """One workload's line."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizers" / "tinyllama" / "tokenizer.json"))
    rows = []
    for prompt, output in WORKLOADS[name](args.data):
        p, o = tokenizer.encode(prompt).ids[-args.prompt :], tokenizer.encode(output).ids[: args.output]
        if len(o) >= 8 and p:
            rows.append((p, o))
    # Spread over all that came after the history; what lies between is learnt in passing, as a server would.
    chosen = np.linspace(min(args.history, len(rows) - 1), len(rows) - 1, args.rows * args.pairs).astype(int).tolist()
    for engine in (plain, spec):
        engine.replay(rows[:1], 1, f"{name}-warm")
    seen = 1
    before = spec.counts()
    pairs = []
    for i in range(args.pairs):
        at, found = chosen[i * args.rows : (i + 1) * args.rows], {}
        part = [rows[k] for k in at]
        spec.remember([rows[k][1] for k in range(seen, at[-1]) if k not in at])
        seen = at[-1] + 1
        for engine in (plain, spec) if i % 2 == 0 else (spec, plain):
            found[engine] = engine.replay(part, args.concurrency, f"{name}-{i}")
        pairs.append([found[plain], found[spec]])
        print(f"  {name} {i}: {found[plain][0] / found[spec][0]:.2f}x decoding, {found[plain][1] / found[spec][1]:.2f}x whole", flush=True)
    after = spec.counts()
    steps, tokens, drafted, accepted = (b - a for a, b in zip(before, after, strict=True))
    decode, whole = ([a[k] / b[k] for a, b in pairs] for k in (0, 1))
    return {
        "workload": name, "rows": len(chosen), "of": len(rows), "output_tokens": int(tokens), "decode": statistics.median(decode),
        "low": min(decode), "high": max(decode),
        "whole": statistics.median(whole), "tokens_per_step": accepted / max(1, tokens - accepted) + 1, "drafted_per_step": drafted / max(1, steps),
        "accepted_share": accepted / max(1, drafted), "target": TARGETS.get(name), "pairs": pairs,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quantization", default="w8a8")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=768, help="last tokens of the prompt that are used")
    parser.add_argument("--output", type=int, default=256, help="first tokens of the output that are used")
    parser.add_argument("--history", type=int, default=100, help="rows whose outputs the drafter knows before the first measured one")
    parser.add_argument("--config", type=json.loads, default={"method": "suffix"})
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    quantization = None if args.quantization == "bf16" else args.quantization
    plain, spec = (Engine(args.model, quantization, c, args.concurrency) for c in (None, args.config))
    lines = [measure(args, name, plain, spec) for name in args.workloads]
    print(f"\n{time.strftime('%Y-%m-%d')} {platform.processor() or platform.machine()}, {args.quantization}, {json.dumps(args.config)}, "
          f"concurrency {args.concurrency}, medians of {args.pairs} pairs")  # fmt: skip
    print("| workload | decoding vs without | spread | target | with prompts | tokens a step | accepted of drafted |\n|---|---|---|---|---|---|---|")
    for r in lines:
        target = "" if r["target"] is None else f"{r['target']:.2f}"
        print(f"| {r['workload']} | {r['decode']:.2f}x | {r['low']:.2f}..{r['high']:.2f} | {target} | {r['whole']:.2f}x | {r['tokens_per_step']:.2f} "
              f"| {r['accepted_share']:.0%} |")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
