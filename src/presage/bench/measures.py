"""Per-request records and what is computed from them, once, for the load generator and the in-process driver alike.

Times are seconds on one monotonic clock. A failed request counts as infinitely slow in percentiles: dropping it would flatter an
overloaded server. Means are over successful requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from presage.core.errors import ConfigError

SEND_DELAY_LIMIT = 0.005
CLIENT_CPU_LIMIT = 0.7
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True)
class Record:
    """One request. ``chunks`` are the arrival times of pieces of output, ``n_out`` the tokens they held; ``error`` is "" if it went well.

    ``held`` seconds it waited in the client for a seat (``max_concurrency``): part of its latency, not of the client's error. ``counts`` are
    the tokens of each piece where the server tells; ``session`` and ``turn`` place it in a conversation.
    """

    t_sched: float
    t_send: float = math.nan
    t_done: float = math.nan
    chunks: list[float] = field(default_factory=list)
    n_in: int = 0
    n_out: int = 0
    error: str = ""
    n_cached: int = 0
    held: float = 0.0
    tenant: str = ""
    session: int = -1
    turn: int = 0
    finish: str = ""
    counts: list[int] = field(default_factory=list)

    @property
    def send_error(self) -> float:
        """How late the client itself sent it: nan if it was not sent."""
        return self.t_send - self.t_sched - self.held

    @property
    def token_times(self) -> list[float]:
        """When each token came: a piece of several tokens brings them all at once. One per piece where the server does not tell."""
        return np.repeat(self.chunks, self.counts).tolist() if self.counts else self.chunks  # type: ignore[no-any-return]

    @property
    def ok(self) -> bool:
        """Whether it ended well, with at least one token."""
        return not self.error and bool(self.chunks)

    @property
    def ttft(self) -> float:
        """Scheduled send to first piece; inf if it failed."""
        return self.chunks[0] - self.t_sched if self.ok else math.inf

    @property
    def e2el(self) -> float:
        """Scheduled send to last piece; inf if it failed."""
        return self.t_done - self.t_sched if self.ok else math.inf

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None with a single token."""
        if not self.ok:
            return math.inf
        return (self.t_done - self.chunks[0]) / (self.n_out - 1) if self.n_out > 1 else None

    def meets(self, goals: dict[str, float]) -> bool:
        """Whether every goal (seconds) is met; a single token has no TPOT and passes that one."""
        return self.ok and all((value := getattr(self, name)) is None or value <= limit for name, limit in goals.items())


def percentile(values: Sequence[float] | np.ndarray, p: float) -> float:
    """Linear-interpolation percentile that keeps infinities; 0 of nothing."""
    ordered = np.sort(np.asarray(values, float))
    if not len(ordered):
        return 0.0
    at = (len(ordered) - 1) * p / 100
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    # inf - inf is nan, so equal neighbours are not interpolated.
    return float(low if low == high else low + (high - low) * (at - math.floor(at)))


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the finite values; 0 of nothing."""
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else 0.0


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """``["ttft:200", "tpot:50"]`` in milliseconds to seconds by name. Raises ConfigError."""
    goals = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "e2el") or not limit >= 0:
            raise ConfigError(f"goodput takes ttft:MS, tpot:MS and e2el:MS, got {word!r}", param="goodput")
        goals[name] = limit / 1e3
    return goals


@dataclass(slots=True)
class Summary:
    """A run in numbers. ``samples`` holds seconds by metric name; ``duration`` runs from the first scheduled send to the last piece."""

    duration: float
    completed: int
    failed: int
    n_in: int
    n_out: int
    samples: dict[str, list[float]]
    good: int | None
    send_delay_p99: float

    @property
    def valid(self) -> bool:
        """Whether the client kept to the schedule: p99 of its own delay is at most 5 ms."""
        return self.send_delay_p99 <= SEND_DELAY_LIMIT

    def rates(self) -> dict[str, float]:
        """Requests and tokens per second under vLLM's names."""
        span = max(self.duration, 1e-9)
        found = {
            "request_throughput": self.completed / span,
            "output_throughput": self.n_out / span,
            "total_token_throughput": (self.n_in + self.n_out) / span,
        }
        return found if self.good is None else {**found, "request_goodput": self.good / span}


def summarise(records: Sequence[Record], goals: dict[str, float] | None = None) -> Summary:
    """All measures of a run."""
    done = [r for r in records if r.ok]
    first = min((r.t_sched for r in records), default=0.0)
    gaps = np.concatenate([np.diff(r.chunks) for r in done]).tolist() if done else []
    delays = [r.send_error for r in records if not math.isnan(r.t_send)]
    return Summary(
        duration=max((r.t_done for r in done), default=first) - first,
        completed=len(done),
        failed=len(records) - len(done),
        n_in=sum(r.n_in for r in done),
        n_out=sum(r.n_out for r in done),
        samples={
            "ttft": [r.ttft for r in records],
            "tpot": [t for r in records if (t := r.tpot) is not None],
            "itl": gaps,
            "e2el": [r.e2el for r in records],
        },
        good=sum(r.meets(goals) for r in records) if goals else None,
        send_delay_p99=percentile(delays, 99),
    )


def as_json(summary: Summary, percentiles: Sequence[float] = (99,)) -> dict[str, Any]:
    """The summary as vLLM's result keys; milliseconds; infinite values become None."""
    out: dict[str, Any] = {
        "duration": summary.duration,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.n_in,
        "total_output_tokens": summary.n_out,
        **summary.rates(),
        "p99_send_delay_ms": 1e3 * summary.send_delay_p99,
        "valid": summary.valid,
    }
    for name, values in summary.samples.items():
        out[f"mean_{name}_ms"] = 1e3 * mean(values)
        out[f"median_{name}_ms"] = 1e3 * percentile(values, 50)
        out |= {f"p{p:g}_{name}_ms": 1e3 * percentile(values, p) for p in percentiles}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in out.items()}


def record_json(record: Record) -> dict[str, Any]:
    """One record as plain data."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(record).items()}
