"""Runs of other engines beside the simulator: the same arrivals and lengths, and how far its times are from the measured ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from presage.bench.measures import Record
from presage.bench.workloads import Requests, Workload
from presage.core.config import EngineConfig
from presage.simulate.fidelity import errors
from presage.simulate.run import Target, simulate


def compare(records: Sequence[Record], config: EngineConfig, target: Target) -> dict[str, dict[str, float]]:
    """``errors`` of TTFT, TPOT and E2E, with p99."""
    at, n_in, n_out = (np.array([getattr(r, name) for r in records]) for name in ("t_sched", "n_in", "n_out"))
    result = simulate(config, Requests(Workload("r", at - at.min(), n_in, n_out)), target)
    where = {name: i for i, name in enumerate(result.ids)}
    order = [where[f"r{i}"] for i in range(len(records))]
    found = {}
    for name, field in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e", "e2el")):
        theirs = np.array([np.nan if (v := getattr(r, field)) is None else v for r in records])
        ours = getattr(result, name)[order]
        both = np.isfinite(ours) & np.isfinite(theirs)
        found[name] = errors(ours[both], theirs[both], 99)
    return found
