"""The suffix drafter against ArcticInference's C++ suffix trees, in one process: memory, insertion, look-ups, recorded outputs.

    python benchmarks/suffix.py [--parts insert,million,calls,replay] [--arctic-python VENV/bin/python] [--data shared/data] [--json out.json]

The comparison needs ``arctic-inference``, here or in the environment of ``--arctic-python`` (same
version of Python); without it our own figures are printed. Only ``replay`` reads data sets. Both sides take turns, call by call; a ratio
is the median over the pairs, so load from elsewhere cancels. Append and look-up times are medians of calls through either package's own
interface: one call for the whole batch here, one per request there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.arctic import ArcticDrafter, load
from presage.bench.draft import learn, new_ids, replay
from presage.bench.recordings import Columns, Recording, recordings
from presage.core.errors import ConfigError
from presage.core.request import Request
from presage.core.types import EMPTY, Ints
from presage.draft.suffix import SuffixDrafter
from presage.draft.suffix_forest import Forest
from presage.tokenize.tokenizer import Tokenizer

WORKLOADS = {
    "tau-bench": ("tau_bench_trajectories/gpt-4o-airline.jsonl", Columns(messages="traj")),
    "miniswe": ("agent_prompt_logs/calls.jsonl.gz", Columns("input", "output", where="source=miniswe")),
    "magagent": ("agent_prompt_logs/calls.jsonl.gz", Columns("input", "output", where="source=magagent")),
    "sql_eval": ("sql_eval/questions_gen_postgres.csv", Columns("question", "query")),
    "spider": ("spider_dev/dev.jsonl", Columns("question", "query")),
    "humaneval": ("humaneval/HumanEval.jsonl", Columns("prompt", "canonical_solution")),
    "gsm8k": ("gsm8k/test.jsonl", Columns("question", "answer")),
}
CAP = 32
Figures = dict[str, float]


def python_source(count: int = 1000, size: int = 1000) -> list[Ints]:
    """``count`` sequences of ``size`` word ids of the standard library's source, shuffled."""
    words: dict[str, int] = {}
    out: list[Ints] = []
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" not in path.parts and len(out) < 1.3 * count:
            text = path.read_text(encoding="utf-8", errors="ignore")
            ids = [words.setdefault(w, len(words)) for w in re.findall(r"\w+|\s+|[^\w\s]", text)][: 8 * size]
            out += [np.array(ids[i : i + size], np.int32) for i in range(0, len(ids) - size + 1, size)]
    np.random.default_rng(0).shuffle(out)  # type: ignore[arg-type]
    return out[:count]


def timed(into: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's answer; its seconds go to ``into``."""
    start = time.perf_counter()
    out = call(*arguments)
    into.append(time.perf_counter() - start)
    return out


def resident(side: str, depth: int, python: str) -> float:
    """Bytes an id of a million that a tree takes in a fresh process; in this one, what earlier trees left would be used again."""
    words = [sys.executable, __file__, "--resident", side, "--depths", str(depth), "--arctic-python", python]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def _resident(side: str, depth: int, python: str) -> float:
    """In the fresh process."""
    sequences, tree_class = python_source(), load("suffix_decoding._C", python).SuffixTree if side == "arctic" else None
    _our_tree(sequences[:2], depth)
    pages = [_pages()]
    kept = _our_tree(sequences, depth) if tree_class is None else _their_tree(tree_class, sequences, depth)
    pages.append(_pages())
    del kept
    # The ids themselves are kept beside our pools.
    return (pages[1] - pages[0]) * os.sysconf("SC_PAGE_SIZE") / sum(map(len, sequences)) + (4 if tree_class is None else 0)


def _pages() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


def insertion(sequences: list[Ints], depth: int, tree_class: Any, python: str, rounds: int = 5) -> Figures:
    """Seconds for all ids into one tree, memory, and removal; turn by turn."""
    total, ours, theirs = sum(map(len, sequences)), list[float](), list[float]()
    for _ in range(rounds):
        forest = timed(ours, _our_tree, sequences, depth)
        if tree_class is not None:
            timed(theirs, _their_tree, tree_class, sequences, depth)
    took: list[float] = []
    some, root = sequences[: len(sequences) // 5], 1
    timed(took, lambda: [forest.remove(root, s) for s in some])
    out = {"depth": depth, "ids": total, "s": _median(ours), "us/removed id": 1e6 * took[0] / sum(map(len, some))}
    out["resident bytes/id"] = resident("ours", depth, python)
    if theirs:
        size = resident("arctic", depth, python)
        out |= {"arctic s": _median(theirs), "arctic resident bytes/id": size, "ratio": _ratio(theirs, ours)}
    return out


def _our_tree(sequences: list[Ints], depth: int) -> Forest:
    forest = Forest(depth)
    root = forest.root()
    forest.extend(root, np.full(len(sequences), root, np.int64), sequences, np.arange(len(sequences), dtype=np.int32))
    return forest


def _their_tree(tree_class: Any, sequences: list[Ints], depth: int) -> Any:
    tree = tree_class(depth)
    for i, s in enumerate(sequences):
        tree.extend_ndarray(i, s)
    return tree


def million(sequences: list[Ints], depth: int, tree: bool) -> Figures:
    """One call for 64 requests over a million stored ids."""
    drafter = SuffixDrafter(CAP, depth, -1, suffix_decoding_tree=tree)
    drafter.library.add([(("", "", "", ""), s) for s in sequences[:1000]])
    live = [Recording(s[:200], s[200:]) for s in sequences[1000:]]
    took: list[float] = []
    _open(drafter, live)
    slots, budget, drafted = np.arange(64, dtype=np.int32), np.full(64, CAP, np.int32), 0
    for at in range(1, 400, 2):
        drafted += len(timed(took, drafter.draft, slots, budget))
        drafter.advance(new_ids({s: one.output[at : at + 2] for s, one in enumerate(live)}))
    return {"depth": depth, "tree": tree, "us/call": 1e6 * _median(took), "drafted/call": drafted / len(took)}


def _open(side: Any, live: list[Recording]) -> None:
    for slot, one in enumerate(live):
        side.open(slot, Request(id=f"live-{slot}", prompt=one.prompt))
        side.advance(new_ids({slot: one.output[:1]}))
    # What earlier requests left behind is forgotten by quota; and prompts are indexed by it.
    for _ in range(200):
        side.advance(new_ids({0: EMPTY}))


def calls(sequences: list[Ints], depth: int, tree: bool, batch: int, arctic: Callable[..., Any] | None) -> Figures:
    """Appends of two ids a request and look-ups at the same history: microseconds per id, ratios, share of equal drafts."""
    settings = {"suffix_decoding_max_tree_depth": depth, "suffix_decoding_max_cached_requests": 100000, "suffix_decoding_tree": tree}
    sides: list[Any] = [SuffixDrafter(CAP, **settings), *([arctic(CAP, **settings)] if arctic else [])]  # type: ignore[arg-type]
    live = [Recording(s[:200], s[200:]) for s in sequences[-batch:]]
    for side in sides:
        learn(side, [Recording(s[:200], s[200:]) for s in sequences[:-batch]])
        _open(side, live)
    slots, budget = np.arange(batch, dtype=np.int32), np.full(batch, CAP, np.int32)
    append, look, same, drafted = [list[float]() for _ in sides], [list[float]() for _ in sides], 0, 0
    for at in range(1, 600, 2):
        new = new_ids({s: one.output[at : at + 2] for s, one in enumerate(live)})
        found = [timed(look[i], side.speculate, slots, budget) for i, side in enumerate(sides)]
        for i, side in enumerate(sides):
            timed(append[i], side.advance, new)
        drafted += len(found[0][0])
        same += _equal(found) if arctic else 0
    per = drafted / len(look[0])
    out = {"depth": depth, "tree": tree, "batch": batch, "us/appended": 5e5 * _median(append[0]) / batch, "us/drafted": 1e6 * _median(look[0]) / per}
    if arctic:
        out |= {"arctic us/appended": 5e5 * _median(append[1]) / batch, "arctic us/drafted": 1e6 * _median(look[1]) / per}
        out |= {"append ratio": _ratio(append[1], append[0]), "draft ratio": _ratio(look[1], look[0]), "same": same / (batch * len(look[0]))}
    return out


def _equal(found: list[Any]) -> int:
    """How many requests' drafts agree."""
    draft, theirs = found[0][0], found[1]
    return sum(draft.token[a:b].tolist() == list(t.token_ids) for a, b, t in zip(draft.offset[:-1], draft.offset[1:], theirs, strict=True))


def _median(values: list[float]) -> float:
    return float(np.median(values))


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return float(np.median(np.array(theirs) / np.array(ours)))


def replays(data: Path, rows: int, arctic: Callable[..., Any] | None) -> list[dict[str, Any]]:
    """Recorded outputs; every side starts empty and learns as it goes."""
    tokenizer = Tokenizer.load(str(data / "tokenizers" / "tinyllama"))
    encode, out = partial(tokenizer.encode, add_special_tokens=False), []
    for name, (path, columns) in WORKLOADS.items():
        # Long prompts lose their beginning, long outputs their end.
        recorded = [Recording(r.prompt[-3000:], r.output[:1500]) for r in recordings(data / path, encode, rows, columns)]
        for factor, tree in ((1.0, False), (2.0, True)):
            settings = {"suffix_decoding_max_tree_depth": 64, "suffix_decoding_max_spec_factor": factor, "suffix_decoding_tree": tree}
            sides: dict[str, Any] = {"ours": SuffixDrafter(CAP, **settings)}  # type: ignore[arg-type]
            if arctic:
                sides["arctic"] = arctic(CAP, **settings)
            for side, drafter in sides.items():
                figures = replay(drafter, recorded, cap=CAP).figures()
                keep = ("tokens_per_step", "drafted_per_step", "accepted_share", "us_per_step", "us_per_drafted", "us_per_appended")
                out.append({"workload": name, "mode": "tree" if tree else "path", "side": side} | {k: figures[k] for k in keep})
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(_cell(row[n]) for n in names) + " |" for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)


def _arctic(python: str) -> tuple[Any, Callable[..., Any] | None]:
    try:
        return load("suffix_decoding._C", python).SuffixTree, partial(ArcticDrafter, python=python)
    except ConfigError as error:
        print(f"Without ArcticInference: {error}")
        return None, None


def main() -> None:
    """Run the parts and print a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="insert,million,calls,replay")
    parser.add_argument("--arctic-python", default="")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--depths", default="24,64")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--history", type=int, default=400, help="sequences of a thousand ids that calls have behind them")
    parser.add_argument("--rows", type=int, default=100, help="requests of each data set")
    parser.add_argument("--json", default="")
    parser.add_argument("--resident", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        print(_resident(options.resident, int(options.depths), options.arctic_python))
        return
    tree_class, arctic = _arctic(options.arctic_python)
    depths, batches = ([int(x) for x in text.split(",")] for text in (options.depths, options.batches))
    sequences, modes = python_source(1064), [(d, t) for d in depths for t in (False, True)]
    _our_tree(sequences[:2], 24).remove(1, sequences[0])  # loads the kernels
    run: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "insert": lambda: [insertion(sequences[:1000], d, tree_class, options.arctic_python) for d in depths],
        "million": lambda: [million(sequences, d, t) for d, t in modes],
        "calls": lambda: [calls(sequences[: options.history], d, t, b, arctic) for d, t in modes for b in batches],
        "replay": lambda: replays(options.data, options.rows, arctic),
    }
    found = {}
    for part in options.parts.split(","):
        found[part] = run[part]()
        print(f"\n{part}\n\n{table(found[part])}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
