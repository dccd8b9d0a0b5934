"""Speculation beside its peers: recorded outputs replayed by Presage, vLLM (suffix) and llama.cpp (prompt lookup), in interleaved pairs.

    python benchmarks/speculation_peers.py MODEL --data SHARED_DATA --vllm-python V/bin/python
        --llamacpp-python L/bin/python --gguf Q4_0=FILE Q8_0=FILE [--own 'w4a8={"method": "suffix"}' ...] [--only equal vllm llama.cpp]
        [--workloads agent tau] [--pairs 9] [--rows 3] [--warm 3] [--history 0] [--concurrency 1] [--json FILE]

MODEL is a bf16 checkpoint folder (random weights do: outputs are forced, work is real). vLLM's environment needs arctic-inference. Each engine
is a process of its own, two at most at once. ``equal``: ours in bf16 with suffix against vLLM in bf16 with suffix. ``vllm``, ``llama.cpp``: the
fastest of ``--own`` against vLLM, and against the fastest of llama.cpp's files, lookup methods and draft lengths; the fastest are found on warm rows,
which come before the measured ones and whose outputs every drafter then knows. A pair is new rows on both sides; its ratio is of seconds from
first token to last. Prints medians of ratios with their spread, tokens a step, ids drafted a step, tokens per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers_pool
from peers import machine
from peers_pool import Pool, Spec, busy
from speculation import WORKLOADS

SUFFIX = '{"method": "suffix"}'
TARGETS = {"equal": 1.3, "vllm": 3.0, "llama.cpp": 3.0}
LOOKUPS = ["copy:0", *(f"{method}:{length}" for method in ("copy", "counts") for length in (4, 8, 16, 32))]
Record = list[list[list[int]]]


@dataclass(frozen=True)
class Rows:
    """``warm`` rows and those of each pair; ``lessons[0]``: outputs known before the warm rows, ``lessons[1 + i]``: learnt before pair i."""

    warm: Record
    pairs: list[Record]
    lessons: list[list[list[int]]]


def recorded(name: str, args: argparse.Namespace) -> Rows:
    """Rows of a workload that fit: whole prompts, so that what requests share stays shared, or with ``--cut`` their ends. Without ``--history``
    the first of the recording; else spread evenly over what comes behind it, and the outputs of all rows before are known."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizers" / "tinyllama" / "tokenizer.json"))
    rows: Record = []
    count = args.rows * args.pairs
    for prompt, output in WORKLOADS[name](args.data):
        if args.cut:
            prompt = prompt[-8 * args.prompt :]
        elif len(prompt) > 8 * args.prompt:
            continue
        p, o = tokenizer.encode(prompt).ids, tokenizer.encode(output).ids[: args.output]
        p = p[-args.prompt :] if args.cut else p
        if 0 < len(p) <= args.prompt and len(o) >= 8:
            rows.append([p, o])
        if not args.history and len(rows) == args.warm + count:
            break
    first = max(args.warm, min(args.history, len(rows) - count))
    step = (len(rows) - first) / count if args.history else 1.0
    places = [first + int(i * step) for i in range(count) if first + int(i * step) < len(rows)]
    pairs, lessons, seen = [], [[o for _, o in rows[: first - args.warm]]], first
    for start in range(0, len(places) - args.rows + 1, args.rows):
        part = places[start : start + args.rows]
        lessons.append([rows[k][1] for k in range(seen, part[-1]) if k not in part])
        pairs.append([rows[k] for k in part])
        seen = part[-1] + 1
    return Rows(rows[first - args.warm : first], pairs, lessons)


class Comparison:
    """Engines asked in turns for the same rows. ``tag`` keeps the names of requests apart."""

    def __init__(self, pool: Pool, args: argparse.Namespace) -> None:
        self.pool, self.args, self.tag = pool, args, 0

    def replay(self, spec: Spec, rows: Record, keep: tuple[Spec, ...] = ()) -> dict[str, Any]:
        """What an engine's ``replay`` says, and ``disturbed``, the share of all cores that anyone else used."""
        self.tag += 1
        worker = self.pool.get(spec, keep)
        found: dict[str, Any] = worker.ask("replay", rows, self.args.concurrency, f"r{self.tag}")
        return found | {"disturbed": worker.disturbed}

    def teach(self, spec: Spec, outputs: list[list[int]], keep: tuple[Spec, ...] = ()) -> None:
        """Outputs that an engine's drafter would have seen."""
        if outputs:
            self.pool.get(spec, keep).ask("remember", outputs)

    def fastest(self, specs: list[Spec], rows: Rows) -> tuple[Spec, str]:
        """The engine, and for llama.cpp its lookup, that needs the least time for warm rows; without asking where there is no choice."""
        lookups = {spec: self.args.lookups if spec.kind == "llama.cpp" else [""] for spec in specs}
        if len(specs) == len(lookups[specs[0]]) == 1:
            return specs[0], lookups[specs[0]][0]
        found = {}
        for spec in specs:
            for lookup in lookups[spec]:
                if lookup:
                    self.pool.get(spec).ask("use", *lookup.split(":"))
                self.teach(spec, rows.lessons[0])
                r = self.replay(spec, rows.warm)
                found[spec, lookup] = r["seconds"]
                print(f"  trial {spec.name} {lookup}: {shown(r)}", flush=True)
            self.pool.stop(spec)  # so that it knows nothing when the pairs begin
        return min(found, key=found.__getitem__)

    def pairs(self, ours: Spec, peer: Spec, lookup: str, rows: Rows) -> list[list[dict[str, Any]]]:
        """[ours, peer's] of each pair, after the warm rows."""
        both = (ours, peer)
        workers = {spec: self.pool.get(spec, both) for spec in both}
        if lookup:
            workers[peer].ask("use", *lookup.split(":"))
        print("  loaded", flush=True)
        began = time.perf_counter()
        for spec in both if rows.warm else ():
            self.teach(spec, rows.lessons[0], both)
            self.replay(spec, rows.warm, both)
        out: list[list[dict[str, Any]]] = []
        for part, lesson in zip(rows.pairs, rows.lessons[1:], strict=True):
            if out and time.perf_counter() - began > self.args.seconds:
                break
            for spec in both:
                self.teach(spec, lesson, both)
            order = both if len(out) % 2 == 0 else both[::-1]
            found = {spec: self.replay(spec, part, both) for spec in order}
            out.append([found[ours], found[peer]])
            a, b = out[-1]
            print(f"  pair {len(out)}: {b['seconds'] / a['seconds']:.2f}x; ours {shown(a)}; peer {shown(b)}", flush=True)
        return out

    def line(self, case: str, name: str, rows: Rows, ours: list[Spec], peers: list[Spec]) -> dict[str, Any]:
        """One row of the table."""
        own, (peer, lookup) = self.fastest(ours, rows)[0], self.fastest(peers, rows)
        pairs = self.pairs(own, peer, lookup, rows)
        ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
        sides = [{k: sum(p[i][k] for p in pairs) for k in ("seconds", "tokens", "steps", "drafted", "forcing")} for i in (0, 1)]
        return {
            "case": case, "workload": name, "ours": own.name, "peer": f"{peer.name} {lookup}".strip(),
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "target": TARGETS[case], "sides": sides,
            "disturbed": max(r["disturbed"] for p in pairs for r in p), "pairs": pairs,
        }  # fmt: skip


def shown(r: dict[str, Any]) -> str:
    """An engine's figures in a few words."""
    tokens, drafted, took = (r[k] / max(1, r["steps"]) for k in ("tokens", "drafted", "seconds"))
    return f"{r['tokens'] / r['seconds']:.1f} tok/s, {tokens:.2f} tok/step, {drafted:.2f} drafted/step, {took * 1e3:.1f} ms/step"


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table."""
    out = ["| case | workload | ours | peer | decoding | spread | target | ours: | peer: | forcing, of peer's time | others' share of cores |"]
    out.append("|---" * 11 + "|")
    for r in lines:
        forcing = r["sides"][1]["forcing"] / r["sides"][1]["seconds"]
        cells = [r["case"], r["workload"], r["ours"], r["peer"], f"{r['ratio']:.2f}x", f"{r['low']:.2f}..{r['high']:.2f}", f">= {r['target']}x"]
        out.append("| " + " | ".join([*cells, *map(shown, r["sides"]), f"{forcing:.2%}", f"{r['disturbed']:.0%}"]) + " |")
    return "\n".join(out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--own", nargs="+", default=[f"w4a8={SUFFIX}"], metavar="PRECISION=JSON", help="ours, of which the fastest is compared")
    parser.add_argument("--vllm-python")
    parser.add_argument("--llamacpp-python")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--equal", default=SUFFIX, help="our speculative configuration in the case of equal precision")
    parser.add_argument(
        "--lookups", nargs="+", default=LOOKUPS, metavar="METHOD:LENGTH", help="llama.cpp's drafters, of which the fastest is compared"
    )
    parser.add_argument("--vllm", default=SUFFIX, help="vLLM's speculative configuration")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["agent", "tau"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--rows", type=int, default=3, help="rows of a pair")
    parser.add_argument("--warm", type=int, default=3, help="rows before the first pair")
    parser.add_argument("--history", type=int, default=0, help="rows of the recording whose outputs all drafters know before the warm rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no pair of a workload later than this after its warm rows began")
    parser.add_argument("--prompt", type=int, default=3000, help="rows with longer prompts are left out")
    parser.add_argument("--cut", action="store_true", help="keep rows with longer prompts, and the end of these (later turns of long sessions)")
    parser.add_argument("--output", type=int, default=1500, help="longer outputs are cut")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once; llama.cpp: only 1")
    parser.add_argument("--room", type=float, default=7.0, help="GiB that must be available before another engine is started")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = arguments()
    peers_pool.WORKER = Path(__file__).with_name("speculation_peers_worker.py")  # the pool's processes run this file
    vllm = [Spec("vllm", f"bf16={args.vllm}", args.vllm_python, args.model)] if args.vllm_python else []
    lookups = [Spec("llama.cpp", variant, args.llamacpp_python, path) for variant, _, path in (g.partition("=") for g in args.gguf)]
    own = [Spec("presage", variant, sys.executable, args.model) for variant in args.own]
    equal = [Spec("presage", f"bf16={args.equal}", sys.executable, args.model)]
    cases = {"equal": (equal, vllm), "vllm": (own, vllm), "llama.cpp": (own, lookups if args.llamacpp_python else [])}
    facts, lines = machine(), []
    with tempfile.TemporaryDirectory(prefix="speculation-peers-") as logs:
        pool = Pool(Path(logs), int(args.room * (1 << 30)))
        comparison = Comparison(pool, args)
        try:
            for case in args.only:
                for name in args.workloads if all(cases[case]) else ():
                    print(f"{case}, {name}", flush=True)
                    lines.append(comparison.line(case, name, recorded(name, args), *cases[case]))
                pool.close()  # the next case's drafters must not know these rows
        finally:
            pool.close()
    facts |= {"busy_after": busy(), "versions": pool.versions}
    print(f"\n{facts['date']}, commit {facts['commit']}, {facts['cores']} cores of {facts['cpu']}; concurrency {args.concurrency}; {pool.versions}\n")
    print(markdown(lines))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
