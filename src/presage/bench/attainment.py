"""Service level goals: what share of requests met them, each and all together, and how that share changes with the goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from presage.bench.measures import Record


def attainment(records: Sequence[Record], goals: dict[str, float]) -> dict[str, float]:
    """Share of the requests *sent* that met each goal (seconds by name) and, under "all", every one; failed ones miss. Empty: 1."""
    n = len(records)
    found = {name: sum(r.meets({name: limit}) for r in records) / n if n else 1.0 for name, limit in goals.items()}
    return {**found, "all": sum(r.meets(goals) for r in records) / n if n else 1.0}


def scale_of(record: Record, goals: dict[str, float]) -> float:
    """The smallest factor on all goals at which this request meets them; inf if it failed."""
    if not record.ok:
        return float("inf")
    return max((v / limit for name, limit in goals.items() if (v := getattr(record, name)) is not None), default=0.0)


def over_scales(records: Sequence[Record], goals: dict[str, float], scales: Sequence[float] | np.ndarray) -> np.ndarray:
    """Joint attainment with all goals times each scale: goals chosen after the results can be seen for what they are."""
    need = np.sort([scale_of(r, goals) for r in records])
    return np.searchsorted(need, np.asarray(scales), side="right") / max(1, len(need))


@dataclass(frozen=True)
class Playback:
    """A user's buffer: the first token is due after ``first`` seconds, each later one ``each`` seconds after the one before."""

    first: float
    each: float


def fluidity(record: Record, goal: Playback) -> float:
    """Share of token deadlines met, where time in hand is carried on and a late token restarts the clock (Etalon, arXiv 2407.07000).

    A gap that is late by several deadlines misses as many. A failed request has 0.
    """
    if not record.ok:
        return 0.0
    slack, met, missed = 0.0, 0, 0
    gaps = np.diff([record.t_sched, *record.token_times]).tolist()
    for i, gap in enumerate(gaps):
        due = goal.each if i else goal.first
        if gap <= due + slack:
            met, slack = met + 1, slack + due - gap
            continue
        missed += int((gap - slack) // goal.each) if i else 1 + int((gap - slack - goal.first) // goal.each)
        slack = 0.0
    return met / (met + missed) if met + missed else 1.0
