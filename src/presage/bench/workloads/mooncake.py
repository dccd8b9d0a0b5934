"""Mooncake traces (Qin et al., FAST 2025): arrivals, lengths and the hashes of the prompt's 512-token blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.workloads.files import each, find, rows
from presage.bench.workloads.ragged import Ragged
from presage.bench.workloads.table import Workload

BLOCK = 512


def read_mooncake(folder: str | Path) -> Workload:
    """``conversation_trace.jsonl`` (or the file itself). Equal hashes are equal content, so prefixes are shared as they were. Raises ConfigError."""
    path = find(folder, "mooncake_fast25/conversation_trace.jsonl")

    def row(r: Any) -> tuple[float, int, int, list[int]]:
        return r["timestamp"] / 1e3, int(r["input_length"]), int(r["output_length"]), [int(h) for h in r["hash_ids"]]

    found = sorted(each(path, rows(path), row), key=lambda r: r[0])
    at, n_in, n_out, hashes = zip(*found)
    sizes = np.maximum(1, n_in), np.maximum(1, n_out)
    return Workload("mooncake", np.array(at) - at[0], *sizes, block=BLOCK, hashes=Ragged.of(hashes))
