"""Recorded prompts and outputs of the data sets as token ids, for recipes that replay them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.draft import Recording
from presage.core.errors import ConfigError
from presage.reproduce.recipe import Job

Rows = Iterator[tuple[str, str]]


def jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped or not."""
    blob = path.read_bytes()
    yield from map(json.loads, (gzip.decompress(blob) if path.suffix == ".gz" else blob).decode().splitlines())


def _agent(job: Job, source: str) -> Rows:
    for row in jsonl(job.data("agent_prompt_logs/calls.jsonl.gz")):
        if row["source"] == source and row.get("output"):
            yield row["input"][-16000:], row["output"] if isinstance(row["output"], str) else json.dumps(row["output"])


def _tau(job: Job) -> Rows:
    for row in jsonl(job.data("tau_bench_trajectories/gpt-4o-airline.jsonl")):
        context = ""
        for m in row["traj"]:
            text = (m.get("content") or "") + (json.dumps(m["tool_calls"]) if m.get("tool_calls") else "")
            if m["role"] == "assistant":
                yield context[-12000:], text
            context += f"\n{m['role']}: {text}"


def _sql(job: Job) -> Rows:
    for row in jsonl(job.data("spider_dev/dev.jsonl")):
        yield f"{row['db_id']}: {row['question']}", row["query"]


def _maths(job: Job) -> Rows:
    for row in jsonl(job.data("gsm8k/test.jsonl")):
        yield row["question"], row["answer"]


def _chat(job: Job) -> Rows:
    for row in jsonl(job.data("alpaca_eval/alpaca_eval.jsonl")):
        yield row["instruction"], row["output"]


WORKLOADS: dict[str, Callable[[Job], Rows]] = {
    "agent": lambda job: _agent(job, "miniswe"),
    "multi-agent": lambda job: _agent(job, "magagent"),
    "tau-bench": _tau,
    "sql": _sql,
    "maths": _maths,
    "chat": _chat,
}
"""Coding agents, groups of agents, an airline's assistant with tools, questions to SQL, worked school problems, open-ended chat."""


def recorded(job: Job, name: str, limit: int, prompt: int = 2000, output: int = 600) -> list[Recording]:
    """Up to ``limit`` requests of a workload, oldest first: the last ``prompt`` ids of each prompt, the first ``output`` of each output.

    Outputs under 8 ids are left out. Raises ConfigError for an unknown workload, CheckpointError if its data are not there.
    """
    from tokenizers import Tokenizer

    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload {name!r}; known: {', '.join(WORKLOADS)}", param="workload")
    encode = Tokenizer.from_file(str(job.data("tokenizers/tinyllama/tokenizer.json"))).encode
    found: list[Recording] = []
    for ask, said in WORKLOADS[name](job):
        if len(found) == limit:
            break
        p, o = encode(ask).ids[-prompt:], encode(said, add_special_tokens=False).ids[:output]
        if len(o) >= 8:
            found.append(Recording(np.array(p, np.int32), np.array(o, np.int32)))
    return found


def split(rows: list[Recording], past: int) -> tuple[list[Recording], list[Recording]]:
    """What a drafter has seen before, and what is replayed."""
    return rows[:past], rows[past:]
