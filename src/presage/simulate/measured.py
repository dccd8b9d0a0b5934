"""Runs of other engines beside the simulator: the same arrivals and lengths, and how far its times are from the measured ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from presage.bench.measures import Record
from presage.core.config import EngineConfig
from presage.simulate.run import Target, simulate
from presage.simulate.trace import LengthTrace


def compare(records: Sequence[Record], config: EngineConfig, target: Target) -> dict[str, dict[str, float]]:
    """Simulated over measured - 1 for mean, median and p99 of TTFT, TPOT and E2E; ``each``: median absolute error over requests."""
    at, n_in, n_out = (np.array([getattr(r, name) for r in records]) for name in ("t_sched", "n_in", "n_out"))
    trace = LengthTrace(at - at.min(), n_in, n_out)
    result = simulate(config, trace, target)
    where = {name: i for i, name in enumerate(result.ids)}
    order = [where[f"{trace.name}{i}"] for i in range(len(trace))]
    found = {}
    for name, field in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e", "e2el")):
        theirs = np.array([np.nan if (v := getattr(r, field)) is None else v for r in records])
        ours = getattr(result, name)[order]
        both = np.isfinite(ours) & np.isfinite(theirs)
        ours, theirs = ours[both], theirs[both]
        found[name] = {
            "mean": float(ours.mean() / theirs.mean() - 1),
            "median": float(np.median(ours) / np.median(theirs) - 1),
            "p99": float(np.percentile(ours, 99) / np.percentile(theirs, 99) - 1),
            "each": float(np.median(np.abs(ours / theirs - 1))),
        }
    return found
