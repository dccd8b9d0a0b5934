"""What the papers on scheduling have in common: length tables at a rate, policies as arms, and the measures their claims are about."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage.bench.arrivals import arrival_times
from presage.bench.capacity import capacity_search
from presage.bench.workloads import Requests, Workload
from presage.core.config import EngineConfig
from presage.core.plan import Budget, Grants
from presage.core.protocols import EngineView, Scheduler
from presage.reproduce.recipe import Job
from presage.schedule import make_scheduler
from presage.schedule.fcfs import Fcfs, Reasons
from presage.simulate.run import Result, Target, simulate

TABLES = {
    "sharegpt": "request_lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
    "arxiv": "request_lengths/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
}


def lengths(job: Job, which: str, n: int, longest: int = 8192, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths [n] drawn from a table without those above ``longest`` together."""
    with open(job.data(TABLES[which]), newline="") as file:
        rows = np.array([(int(r["num_prefill_tokens"]), int(r["num_decode_tokens"])) for r in csv.DictReader(file)])
    rows = rows[(rows.sum(1) < longest) & (rows.min(1) > 0)]
    picked = rows[np.random.default_rng(seed).choice(len(rows), n, replace=n > len(rows))]
    return picked[:, 0], picked[:, 1]


def at_rate(sizes: tuple[np.ndarray, np.ndarray], rate: float, seed: int = 1) -> Requests:
    """The requests as a Poisson stream of ``rate`` requests a second (inf: all at once)."""
    return Requests(Workload("r", arrival_times(len(sizes[0]), rate, seed=seed), *sizes))


@dataclass(frozen=True)
class Arm:
    """A policy under test: its name and dials, or a class of one's own (``make``), and settings of the engine."""

    policy: str = "fcfs"
    dials: dict[str, Any] = field(default_factory=dict)
    make: Callable[[Any], Scheduler] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> EngineConfig:
        """The engine's configuration."""
        return EngineConfig.of(scheduling_policy=self.policy, scheduling_config=self.dials or None, max_waiting=1 << 20, **self.settings)

    def parts(self, config: EngineConfig) -> dict[str, Any]:
        """Factories for ``simulate``: every replica gets a policy of its own, which hears of arrivals if it wants to."""
        make, made = self.make or (lambda scheduler: make_scheduler(scheduler)), list[Scheduler]()

        def companions() -> tuple[Any, ...]:
            made.append(make(config.scheduler))
            return (made[-1],) if hasattr(made[-1], "open") else ()

        return {"companions": companions, "scheduler": lambda: made.pop()}

    def run(self, trace: Any, target: Target, keep: bool = True, **more: Any) -> Result:
        """The trace through one virtual engine (or ``replicas=``), token times kept."""
        config = self.config()
        return simulate(config, trace, target, keep_tokens=keep, **self.parts(config), **more)


class PrefillFirst(Fcfs):
    """What engines did before chunks: whole prompts as soon as there are any, everybody else waits for them (early vLLM, Orca's order)."""

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """Prompts alone while one can be let in, else decoding rows."""
        why: Reasons = []
        if len(view.queue) and not (view.gap[view.ready] > 1).any():
            some = self._admit(view, budget.tokens, min(budget.spans, view.max_num_seqs - view.running), why)
            if some:
                return Grants.of([s for s, _ in some], [n for _, n in some], view.layers, why=why)
        return super().plan(view, budget)


def gaps(result: Result) -> np.ndarray:
    """Seconds between consecutive tokens of all requests."""
    parts = [np.diff(t) for t in result.tokens.values() if len(t) > 1]
    return np.concatenate(parts) if parts else np.zeros(1)


def percentile(values: np.ndarray, q: float) -> float:
    """The q-th percentile of finite values; inf if more than the rest are not."""
    return float(np.percentile(values, q, method="higher")) if len(values) else float("nan")


def steady_rate(result: Result) -> float:
    """Requests per second while a burst is worked off, without its beginning and its tail."""
    done = np.sort(result.requests["done"])
    a, b = int(0.1 * len(done)), int(0.8 * len(done))
    return float((b - a) / max(1e-9, done[b] - done[a]))


def waited(result: Result) -> np.ndarray:
    """Seconds from arrival to the first step, by request."""
    return np.asarray(result.requests["start"] - result.requests["arrival"])


def capacity(trial: Callable[[float], bool], start: float, tolerance: float = 0.06) -> float:
    """The highest rate that ``trial`` passes."""
    return capacity_search(lambda rate: float(trial(rate)), 0.5, start, tolerance, start / 64, start * 64).rate
