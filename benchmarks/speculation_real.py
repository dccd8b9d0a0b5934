"""Speculation on text that the model really writes: Python and SQL prompts, every drafter against the same engine without one.

    python benchmarks/speculation_real.py [--model presage-tiny] [--draft presage-tiny-draft] [--prompts 20]
        [--max-tokens 128] [--drafters suffix ngram model hybrid] [--concurrency 1] [--threads 1] [--json FILE]

All engines live in one process and answer group after group of prompts in turn, so that other load on the machine hits all of them; each prompt is
answered once per engine, after a warm-up on other prompts. Answers that run into a loop (few distinct 4-grams) flatter every drafter, so
they are reported apart. ``x`` is the ratio of summed wall times, its quartiles are over the groups; tokens must be equal, or the run fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from presage import LLM, SamplingParams
from presage.core.plan import Grants, StepPlan
from presage.engine.log import NullLog
from presage.engine.loop import Loop

DATA = Path(os.environ.get("PRESAGE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
LOOPING = 0.5
"""An answer whose distinct 4-grams are fewer than this share of all of them is a loop."""
WARM = 4
PLACES = 5


def configurations(draft: str) -> dict[str, dict[str, Any] | None]:
    """Engines by name. ``model`` under the default policy may decide not to draft; ``model fixed`` always does."""
    model = {"method": "draft_model", "model": draft, "num_speculative_tokens": 4}
    return {
        "none": None,
        "suffix": {"method": "suffix"},
        "ngram": {"method": "ngram", "num_speculative_tokens": 8},
        "model": model,
        "model fixed": {**model, "num_speculative_tokens": 3, "length": "fixed"},
        "model tree": {**model, "num_speculative_tokens": 6, "tree_width": 2, "tree_depth": 3, "length": "fixed"},
        "hybrid": {"method": "hybrid", "combine": "threshold", "tau": 1.0, "drafters": [{"method": "suffix"}, model]},
        "merged": {"method": "hybrid", "drafters": [{"method": "suffix"}, model], "length": {"policy": "fixed", "num_speculative_tokens": 6}},
    }


class Steps(NullLog):
    """Counts steps that verify; a log is told of each."""

    def __init__(self) -> None:
        self.count = 0

    def decided(self, loop: Loop, plan: StepPlan, grants: Grants) -> None:
        """A step was launched."""
        self.count += 1


@dataclass
class Tally:
    """What one engine did on one kind of answers. ``seconds`` by group; ``drafted``, ``accepted`` by place in the draft."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    drafted: np.ndarray = field(default_factory=lambda: np.zeros(PLACES, np.int64))
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(PLACES, np.int64))
    nodes: int = 0
    taken: int = 0


class Player:
    """One engine, its counters read around each group of prompts."""

    def __init__(self, args: argparse.Namespace, spec: dict[str, Any] | None) -> None:
        memory = {"max_num_seqs": max(4, args.concurrency), "kv_cache_memory": "64MiB", "enable_prefix_caching": False}
        self.llm = LLM(args.model, threads=args.threads, speculative_config=spec, **memory)
        self.steps = self.llm.engine.loop.log = Steps()

    def play(self, prompts: list[dict[str, Any]], params: SamplingParams, tally: Tally) -> list[list[int]]:
        """Answer the prompts together; the ids of each."""
        s = self.llm.engine.loop.speculation
        before = s.drafted.copy(), s.accepted.copy(), self.steps.count
        start = time.perf_counter()
        answers = [o.outputs[0].token_ids for o in self.llm.generate(prompts, params)]
        tally.seconds.append(time.perf_counter() - start)
        tally.tokens += sum(map(len, answers))
        tally.steps += self.steps.count - before[2]
        for total, now, was in ((tally.drafted, s.drafted, before[0]), (tally.accepted, s.accepted, before[1])):
            total += (now - was)[:PLACES]
        tally.nodes += int((s.drafted - before[0]).sum())
        tally.taken += int((s.accepted - before[1]).sum())
        return answers


def python_prompts(llm: LLM, count: int) -> list[dict[str, Any]]:
    """Function headers with their docstrings, to be completed."""
    rows = [json.loads(line) for line in next((DATA / "humaneval").glob("*.jsonl")).open()]
    return [{"prompt_token_ids": llm.tokenizer.encode(r["prompt"], add_special_tokens=False)} for r in rows[:count]]


def sql_prompts(llm: LLM, count: int) -> list[dict[str, Any]]:
    """Questions to databases, as a chat."""
    with (DATA / "sql_eval" / "questions_gen_sqlite.csv").open(newline="") as file:
        rows = [r for _, r in zip(range(count), csv.DictReader(file))]
    render, encode = llm.tokenizer.chat_template.render, llm.tokenizer.encode
    asked = [f"Database {r['db_name']}. {r['question']} Write the SQL query." for r in rows]
    texts = [render([{"role": "user", "content": text}], add_generation_prompt=True) for text in asked]
    return [{"prompt_token_ids": encode(text, add_special_tokens=False)} for text in texts]


def looping(ids: list[int]) -> bool:
    """Whether an answer repeats itself."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return len(grams) >= 16 and len(set(grams)) < LOOPING * len(grams)


def measure(args: argparse.Namespace) -> dict[tuple[str, str, str], Tally]:
    """(workload, kind of answer, engine) -> tally."""
    known = configurations(args.draft)
    names = ["none", *args.drafters]
    players = {name: Player(args, known[name]) for name in names}
    settings = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=args.max_tokens),
        "sampled": SamplingParams(temperature=0.7, repetition_penalty=1.1, seed=1, max_tokens=args.max_tokens),
    }
    found: dict[tuple[str, str, str], Tally] = {}
    for load, make in (("python", python_prompts), ("sql", sql_prompts)):
        prompts = make(players["none"].llm, WARM + args.prompts)
        for how, params in settings.items():
            for player in players.values():
                player.play(prompts[:WARM], params, Tally())
            whole = players["none"].llm.generate(prompts[WARM:], params)
            kinds = ["loops" if looping(o.outputs[0].token_ids) else "text" for o in whole]
            for kind in ("text", "loops"):
                mine = [p for p, k in zip(prompts[WARM:], kinds, strict=True) if k == kind]
                for at in range(0, len(mine), args.concurrency):
                    group, answers = mine[at : at + args.concurrency], {}
                    for name in names[at // args.concurrency % len(names) :] + names[: at // args.concurrency % len(names)]:
                        tally = found.setdefault((f"{load}, {how}", kind, name), Tally())
                        answers[name] = players[name].play(group, params, tally)
                    if any(answers[name] != answers["none"] for name in names):
                        raise SystemExit(f"{load}, {how}: tokens differ between engines")
    for player in players.values():
        player.llm.close()
    return found


def line(key: tuple[str, str, str], t: Tally, base: Tally) -> dict[str, Any]:
    """A row of the table."""
    ratios = [a / b for a, b in zip(base.seconds, t.seconds, strict=True)]
    spread = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "workload": key[0],
        "answers": f"{key[1]} ({len(t.seconds)})",
        "drafter": key[2],
        "tokens/s": round(t.tokens / sum(t.seconds)),
        "x": round(sum(base.seconds) / sum(t.seconds), 2),
        "quartiles": f"{spread[0]:.2f}..{spread[2]:.2f}",
        "tokens/step": round(t.tokens / t.steps, 2),
        "drafted/step": round(t.nodes / t.steps, 2),
        "accepted": round(t.taken / t.nodes, 2) if t.nodes else "",
        "by place": " ".join(f"{a / d:.2f}" for a, d in zip(t.accepted, t.drafted, strict=True) if d >= 10),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="presage-tiny")
    parser.add_argument("--draft", default="presage-tiny-draft")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drafters", nargs="+", default=["suffix", "ngram", "model", "model fixed", "hybrid"], choices=[*configurations("")][1:])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args)
    rows = [line(key, tally, found[key[0], key[1], "none"]) for key, tally in found.items()]
    order = {name: i for i, name in enumerate(configurations(""))}
    rows.sort(key=lambda r: (r["workload"], r["answers"].startswith("loops"), order[r["drafter"]]))
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(v) for v in row.values()) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
