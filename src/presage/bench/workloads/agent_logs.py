"""Full prompts of running agents (LMCache): every call repeats the text before it and adds to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from presage.bench.workloads.files import each, find, rows
from presage.bench.workloads.table import Workload, chained


def read_agent_logs(folder: str | Path, think: float | None = None) -> Workload:
    """``calls.jsonl.gz``: a session per agent run, a tenant per agent. Raises ConfigError.

    The log has one time per call, not two, so what passed between an answer and the next call is unknown: ``think`` seconds if given,
    else the whole time between the two calls, an upper bound.
    """
    path = find(folder, "agent_prompt_logs/calls.jsonl")
    calls = each(path, rows(path), lambda r: (str(r["session_id"]), r["timestamp"] / 1e6, r["input"], r["output"], r["source"]))
    # A few calls were logged without their prompt.
    calls = [c for c in calls if c[2]]
    begun: dict[str, float] = {}
    for name, t, *_ in calls:
        begun[name] = min(t, begun.get(name, t))
    calls.sort(key=lambda c: (begun[c[0]], c[0], c[1]))
    names, t, prompts, answers, source = zip(*calls)
    after, session, turn = chained(_runs(names))
    start = np.array([begun[n] for n in names])
    gap = np.diff(np.array(t), prepend=t[0])
    tenants = tuple(dict.fromkeys(source))
    return Workload(
        "agent_logs", np.array(t) - start.min(), after=after, think=np.where(after < 0, 0.0, gap if think is None else think), session=session,
        turn=turn, tenant=np.array([tenants.index(s) for s in source]), tenants=tenants, prompts=prompts, answers=answers,
    )  # fmt: skip


def _runs(names: tuple[str, ...]) -> np.ndarray:
    """Lengths of runs of equal names."""
    edges = [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1]), len(names)]
    return np.diff(edges)
