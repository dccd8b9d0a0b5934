"""Agentic coding sessions with block hashes: each call waits for the one before it and for the tools in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.workloads.files import each, find, rows
from presage.bench.workloads.ragged import Ragged
from presage.bench.workloads.table import Workload, chained
from presage.core.errors import ConfigError

SCOPE = 1 << 24
"""Hash ids count from 1 in every session; this many are kept apart for each."""


def read_agentic(folder: str | Path, spacing: float = 0.0) -> Workload:
    """``sessions.jsonl.gz``: sessions begin ``spacing`` seconds apart. Raises ConfigError.

    Think time is the time from the end of the call before (its start, where nobody recorded how long it took) to the start of this one.
    """
    path = find(folder, "agentic_coding_sessions/sessions.jsonl")
    sessions = each(path, rows(path), lambda r: (r["id"], int(r["block_size"]), _calls(r["requests"])))
    blocks = {block for _, block, _ in sessions}
    if len(blocks) != 1:
        raise ConfigError(f"{path} mixes block sizes {sorted(blocks)}", param="dataset_path")
    after, session, turn = chained(np.array([len(calls) for *_, calls in sessions]))
    calls = [call for *_, calls in sessions for call in calls]
    t, think, n_in, n_out = (np.array([c[i] for c in calls]) for i in range(4))
    offset = session.astype(np.int64) * SCOPE
    hashes = Ragged.of([np.array(c[4], np.int64) + base for c, base in zip(calls, offset.tolist())])
    return Workload(
        "agentic", t + session * spacing, np.maximum(1, n_in), np.maximum(1, n_out), after=after, think=think, session=session, turn=turn,
        block=blocks.pop(), hashes=hashes,
    )  # fmt: skip


def _calls(requests: list[Any]) -> list[tuple[float, float, int, int, list[int]]]:
    """(start, think, tokens in, tokens out, hashes) of the calls of a session, in order of time."""
    made: list[tuple[float, float, int, int, list[int]]] = []
    ended = first = None
    for r in sorted(requests, key=lambda r: float(r["t"])):
        t = float(r["t"])
        first = t if first is None else first
        think = 0.0 if ended is None else max(0.0, t - ended)
        made.append((t - first, think, int(r["in"]), int(r["out"]), r["hash_ids"]))
        ended = t + float(r.get("api_time") or 0.0)
    return made
