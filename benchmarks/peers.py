"""Presage beside vLLM, llama.cpp and OpenVINO on this CPU: the table of figures an ordinary machine must reach.

    python benchmarks/peers.py MODEL --own bf16 w8a8 w4a8 bf16x12 --vllm-python V/bin/python
        --llamacpp-python L/bin/python --gguf Q4_0=FILE Q8_0=FILE bf16=FILE --openvino-python O/bin/python --openvino int8=DIR int4=DIR
        [--pairs 5] [--only decode-1 verify] [--json FILE] [--markdown FILE]

MODEL is a bf16 checkpoint folder (random weights do). Each engine is a process of its own, loaded once, asked in turns; ratios are medians
of pairs, with their spread. Figures: decode-1, decode-16, prefill-1024, linear, verify, traffic, start-up, quality; ``matrix`` is one look at
every engine. A figure whose engines are not given is listed as not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers_figures import FIGURES, Bench, Row, best_of, matrix, quality
from peers_pool import EngineFailed, Pool, Spec, busy

CASES = ("decode-1", "decode-4", "decode-16", "prefill-512", "prefill-1024", "verify-256")
BESTS = {"decode-16": ("decode batch 16", 2.2), "prefill-1024": ("prefill 1,024", 1.6)}


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cpu = memory = ""
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        named = {k.strip(): v.strip() for k, v in facts.items()}
        flags = [f for f in named.get("flags", "").split() if f.startswith(("avx", "amx")) or f == "fma"]
        cpu = f"{named.get('model name', '')} (family {named.get('cpu family')}, model {named.get('model')}; {' '.join(flags)})"
        memory = f"{int(Path('/proc/meminfo').read_text().split()[1]) / (1 << 20):.1f} GiB"
    except OSError:
        cpu = platform.processor()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit(), "cpu": cpu, "cores": os.cpu_count(), "memory": memory,
        "kernel": platform.release(), "python": platform.python_version(), "busy_before": busy(),
    }  # fmt: skip


def commit() -> str:
    """The checkout's commit, marked if files differ from it; empty outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def specs(args: argparse.Namespace) -> tuple[list[Spec], list[Spec]]:
    """Our engines and the peers that the command line names."""
    own = [Spec("presage", variant, sys.executable, args.model) for variant in args.own]
    peers = [Spec("vllm", "bf16", args.vllm_python, args.model)] if args.vllm_python else []
    for kind, python, given in (("llama.cpp", args.llamacpp_python, args.gguf), ("openvino", args.openvino_python, args.openvino)):
        if python:
            peers += [Spec(kind, variant, python, path) for variant, _, path in (g.partition("=") for g in given)]
    return own, peers


def number(value: float, unit: str) -> str:
    """With the digits a unit deserves."""
    return f"{value:.2f}" if unit in ("x", "T op/s") else f"{value:.1f}"


def markdown(rows: list[Row], overview: dict[str, dict[str, float | None]], facts: dict[str, Any]) -> str:
    """The tables, and what they were measured on."""
    out = [
        f"{facts['date']}, commit {facts['commit']}, {facts['cores']} cores of {facts['cpu']}, {facts['memory']}; {facts['pairs']} pairs;"
        f" others used {facts['busy_before']:.0%} of the cores before, {facts['busy_after']:.0%} after,"
        f" and at most {facts['disturbed']:.0%} during a measurement that counts.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(facts["versions"].items()) if v) + ".",
        "",
    ]
    if rows:
        out += ["| figure | | target | measured (spread) | verdict | plain read | |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        sign = "≥" if r.at_least else "≤"
        found = "–" if r.value is None else f"{number(r.value, r.unit)} ({number(r.low, r.unit)}..{number(r.high, r.unit)})"
        read = f"{statistics.median(r.read) / 1e9:.1f} GB/s" if r.read else ""
        unit = "x" if r.unit == "x" else f" {r.unit}"
        out.append(f"| {r.figure} | {r.part} | {sign} {r.target:g}{unit} | {found} | {r.verdict} | {read} | {r.note} |")
    if overview:
        cases = list(next(iter(overview.values())))
        out += ["", "One look at each (tokens/s; verify: time of 8 rows over 1):", ""]
        out += ["| engine | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
        for name, found_by in overview.items():
            shown = ["–" if v is None else f"{v:.2f}x" if c.startswith("verify") else f"{v:.1f}" for c, v in found_by.items()]
            out.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(out) + "\n"


def run(bench: Bench, wanted: set[str], given: dict[str, float]) -> tuple[list[Row], dict[str, dict[str, float | None]]]:
    """All wanted figures, in the order of the table, and the overview."""
    rows: list[Row] = []
    cases = [c for c in CASES if "matrix" in wanted or c in wanted & set(BESTS)]
    overview = matrix(bench, cases) if cases else {}
    for name in ("decode-1", "decode-16", "prefill-1024", "linear", "verify", "traffic", "start-up"):
        if name not in wanted:
            continue
        try:
            if name in BESTS:
                label, target = BESTS[name]
                found = [best_of(bench, Row(label, "best of ours vs best peer", target, "x"), name, overview)]
            else:
                found = FIGURES[name](bench)
        except EngineFailed as error:
            found = [Row(name, "", 0.0, "x", note=str(error))]
        for r in found:
            value = "" if r.value is None else f"{number(r.value, r.unit)} ({number(r.low, r.unit)}..{number(r.high, r.unit)}) {r.unit}"
            print(f"{r.figure}: {r.part}: {value} [{r.verdict}] {r.note}", flush=True)
        rows += found
    return rows + (quality(given) if "quality" in wanted else []), overview


def arguments() -> argparse.Namespace:
    """The command line."""
    every = ["matrix", *FIGURES, *BESTS, "quality"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--own", nargs="*", default=["bf16"], help="precisions of ours: bf16, or names for --quantization")
    parser.add_argument("--vllm-python")
    parser.add_argument("--llamacpp-python")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="NAME=FILE", help="Q4_0=FILE Q8_0=FILE ...")
    parser.add_argument("--openvino-python")
    parser.add_argument("--openvino", nargs="+", default=[], metavar="NAME=DIR", help="int8=DIR ...")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs=2, default=[16, 80], help="the two output lengths of decode figures")
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--quality", type=Path, help='JSON file {"w8a8": percent, "w4a8": percent}: perplexity above that of bf16')
    parser.add_argument("--room", type=float, default=7.0, help="GiB that must be available before another engine is started")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for quiet before asking again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, write the files."""
    args = arguments()
    own, peers = specs(args)
    facts = machine()
    if facts["busy_before"] > 0.1:
        print(f"the machine is {facts['busy_before']:.0%} busy with something else: do not trust what follows", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="peers-") as logs:
        pool = Pool(Path(logs), int(args.room * (1 << 30)))
        bench = Bench(pool, own, peers, args.pairs, sys.executable, tuple(args.lengths), args.patience)
        try:
            rows, overview = run(bench, set(args.only), json.loads(args.quality.read_text()) if args.quality else {})
        finally:
            pool.close()
    facts |= {"pairs": args.pairs, "lengths": args.lengths, "versions": pool.versions}
    facts |= {"busy_after": busy(), "disturbed": max(bench.disturbed, default=0.0)}
    text = markdown(rows, overview, facts)
    print("\n" + text)
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "rows": [r.as_dict() for r in rows], "matrix": overview}, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
