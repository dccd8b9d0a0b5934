"""The run over time: how many requests were in flight, which part of it was steady, whether the server fell behind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from presage.bench.measures import Record

Series = tuple[np.ndarray, np.ndarray]
"""Times (s from the first scheduled send) and the value from each on."""


def _steps(begin: np.ndarray, end: np.ndarray) -> Series:
    """How many of the intervals [begin, end) hold at each moment."""
    if not len(begin):
        return np.zeros(1), np.zeros(1)
    at = np.concatenate([begin, end])
    change = np.concatenate([np.ones(len(begin)), -np.ones(len(end))])
    order = np.lexsort((change, at))
    t, total = at[order], np.cumsum(change[order])
    last = np.append(np.diff(t) > 0, True)
    return t[last], total[last]


def in_flight(records: Sequence[Record]) -> dict[str, Series]:
    """Requests without a first token yet ("waiting") and those whose tokens come ("decoding")."""
    start = min((r.t_sched for r in records if not math.isnan(r.t_sched)), default=0.0)
    done = [r for r in records if r.ok]
    sched, first, end = (np.array([f(r) - start for r in done]) for f in (lambda r: r.t_sched, lambda r: r.chunks[0], lambda r: r.t_done))
    return {"waiting": _steps(sched, first), "decoding": _steps(first, end)}


def concurrency(records: Sequence[Record]) -> dict[str, float]:
    """``peak`` requests in flight, and their ``mean`` over the run (Little's law)."""
    done = [r for r in records if r.ok]
    if not done:
        return {"peak": 0.0, "mean": 0.0}
    begin, end = np.array([r.t_sched for r in done]), np.array([r.t_done for r in done])
    span = max(1e-9, float(end.max() - begin.min()))
    return {"peak": float(_steps(begin, end)[1].max()), "mean": float((end - begin).sum() / span)}


def steady(records: Sequence[Record], share: float = 0.1) -> list[Record]:
    """Requests due after the first and before the last ``share`` of the sending time: without the ramp up and down."""
    at = [r.t_sched for r in records if not math.isnan(r.t_sched)]
    if not at:
        return []
    low, high = min(at) + share * (max(at) - min(at)), max(at) - share * (max(at) - min(at))
    return [r for r in records if low <= r.t_sched <= high]


def _rises(t: np.ndarray, y: np.ndarray) -> bool:
    """Whether a straight line through the points rises beyond doubt: its slope is over twice the half width of its 95 % interval."""
    if len(t) < 30 or t.std() == 0:
        return False
    t0 = t - t.mean()
    slope = float((t0 * y).sum() / (t0 * t0).sum())
    rest = y - y.mean() - slope * t0
    error = math.sqrt(float((rest * rest).sum()) / (len(t) - 2) / float((t0 * t0).sum()))
    return slope > 2 * 1.96 * error and slope > 0


def saturated(records: Sequence[Record], last: float = 120.0, limit: float = 2.5) -> bool:
    """Whether the server fell behind: in the last seconds of sending, TTFT and requests in flight both rise, and TTFT is over ``limit`` s.

    Longer runs at this rate would show longer waits, so its latencies say nothing but that.
    """
    done = sorted((r for r in records if r.ok), key=lambda r: r.t_sched)
    if not done or done[-1].t_sched - done[0].t_sched < 30:
        return False
    late = [r for r in done if r.t_sched >= done[-1].t_sched - last]
    t, ttft = np.array([r.t_sched for r in late]), np.array([r.ttft for r in late])
    ends = np.sort([r.t_done for r in done])
    begun = np.searchsorted([r.t_sched for r in done], t, side="right")
    live = begun - np.searchsorted(ends, t, side="right")
    return bool(_rises(t, ttft) and _rises(t, live.astype(float)) and float(np.median(ttft[len(ttft) // 2 :])) > limit)
