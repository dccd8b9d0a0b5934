"""Measured vLLM runs on a ShareGPT workload (LLMServingSim): what was sent with its token ids, and when tokens came back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.measures import Record
from presage.bench.workloads.files import each, find, rows
from presage.bench.workloads.ragged import Ragged
from presage.bench.workloads.table import Workload

WORKLOADS = {"llama": "sharegpt-llama-3.1-8b-300-sps10.jsonl", "qwen": "sharegpt-qwen3-32b-300-sps10.lengths.jsonl"}
RUNS = {"llama": "RTXPRO6000_Llama-3.1-8B", "qwen": "RTXPRO6000_Qwen3-32B"}


def read_vllm_workload(folder: str | Path, which: str = "llama") -> Workload:
    """What was offered: arrivals, lengths and (llama) the ids of prompts and answers. Raises ConfigError."""
    path = find(folder, f"vllm_measured_runs/{WORKLOADS[which]}")

    def row(r: Any) -> tuple[float, int, int, list[int], list[int]]:
        return r["arrival_time_ns"] / 1e9, int(r["input_toks"]), int(r["output_toks"]), r.get("input_tok_ids", []), r.get("output_tok_ids", [])

    at, n_in, n_out, ids, replies = zip(*sorted(each(path, rows(path), row), key=lambda r: r[0]))
    texts: dict[str, Any] = {"ids": Ragged.of(ids, np.int32), "replies": Ragged.of(replies, np.int32)} if any(ids) else {}
    return Workload(f"vllm_{which}", np.array(at) - at[0], np.array(n_in), np.array(n_out), **texts)


def read_vllm_records(folder: str | Path, which: str = "llama") -> list[Record]:
    """What vLLM did with it: a record per request, first and last token only (so no inter-token gaps). Raises ConfigError."""
    path = find(folder, f"vllm_measured_runs/{RUNS[which]}/requests.jsonl")
    keys = "arrival_time", "queued_ts", "first_token_ts", "last_token_ts"
    found = each(path, rows(path), lambda r: ([float(r[k]) for k in keys], int(r["input_toks"]), int(r["output_toks"])))
    found.sort(key=lambda r: r[0][0])
    # Arrivals are on the wall clock, tokens on the monotonic one; the first request was queued as it arrived.
    shift = found[0][0][1] - found[0][0][0]
    out = []
    for (at, _, first, last), n_in, n_out in found:
        out.append(Record(at + shift, at + shift, last, [first, last][:n_out], n_in, n_out))
    return out
