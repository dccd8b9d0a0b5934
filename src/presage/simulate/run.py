"""``simulate(config, workload, latency, model) -> Result``: a workload through virtual engines, as arrays."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage.bench.measures import Record, Summary, summarise
from presage.cache.manager import block_managers
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.kv import KVGeometry
from presage.core.protocols import LatencyModel, Scheduler
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Finish
from presage.engine.cutter import Cutter
from presage.engine.loop import Loop
from presage.engine.replay import loop_config
from presage.schedule import make_scheduler
from presage.simulate.collect import Collector, RowEmitter
from presage.simulate.driver import Replica, Route, VirtualDriver, least_loaded
from presage.simulate.executor import ModelledExecutor
from presage.simulate.oracle import TraceOracle

_BAD = (int(Finish.ERROR), int(Finish.ABORT))


@dataclass(frozen=True)
class Target:
    """What is simulated: step prices, KV pools and depth of the stack. ``idle_watts`` are drawn whether steps run or not."""

    latency: LatencyModel
    geometry: KVGeometry
    layers: int
    max_model_len: int
    eos: tuple[int, ...] = ()
    idle_watts: float = 0.0
    depth: int = 1


@dataclass(slots=True)
class Result:
    """What a run left: a row per request (``requests``, by completion), a row per step (``steps``), totals.

    ``wall`` seconds this machine took, ``turns`` of the loops, ``interrupted`` by Ctrl-C: then requests that had not ended are missing.
    """

    ids: list[str]
    requests: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]
    errors: dict[int, str]
    duration: float
    n_steps: int
    turns: int
    busy: float
    joules: float
    wall: float
    interrupted: bool
    replicas: int
    tokens: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def ok(self) -> np.ndarray:
        """Which requests ended well."""
        return ~np.isin(self.requests["finish"], _BAD)

    @property
    def ttft(self) -> np.ndarray:
        """Arrival to first token, seconds; inf for requests that failed."""
        r = self.requests
        return np.where(self.ok & (r["first"] > 0), r["first"] - r["arrival"], np.inf)

    @property
    def e2e(self) -> np.ndarray:
        """Arrival to last token, seconds; inf for requests that failed."""
        return np.where(self.ok, self.requests["done"] - self.requests["arrival"], np.inf)

    @property
    def tpot(self) -> np.ndarray:
        """Seconds per token after the first; nan where there is only one."""
        r = self.requests
        many = r["n_out"] > 1
        return np.where(many, (r["done"] - r["first"]) / np.where(many, r["n_out"] - 1, 1), np.nan)

    @property
    def requests_per_second(self) -> float:
        """Simulated requests per second of this machine's time."""
        return len(self.ids) / max(self.wall, 1e-9)

    def records(self) -> list[Record]:
        """The load generator's records, for its measures; chunks are all tokens if they were kept, else first and last."""
        r = self.requests
        out = []
        for i in range(len(self.ids)):
            at = self.tokens.get((int(r["replica"][i]), int(r["seq"][i])))
            chunks = at.tolist() if at is not None else [float(r["first"][i]), float(r["done"][i])][: int(r["n_out"][i])]
            error = self.errors.get(i, "" if self.ok[i] else "aborted")
            at0 = float(r["arrival"][i])
            one = Record(at0, at0, float(r["done"][i]), chunks, int(r["n_in"][i]), int(r["n_out"][i]), error, int(r["n_cached"][i]))
            one.finish = "" if error else Finish(int(r["finish"][i])).name.lower()
            out.append(one)
        return out

    def timeline(self, buckets: int = 200) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Means over equal spans of time, for plots: rows of a step, KV tokens read in it, watts of all replicas. Empty without steps."""
        s = self.steps
        if not len(s["t0"]):
            return {}
        edges = np.linspace(s["t0"].min(), s["t1"].max(), buckets + 1)
        where = np.clip(np.searchsorted(edges, (s["t0"] + s["t1"]) / 2) - 1, 0, buckets - 1)
        busy, middle = s["t1"] - s["t0"], (edges[:-1] + edges[1:]) / 2
        total = np.maximum(np.bincount(where, busy, buckets), 1e-12)
        found = {name: (middle, np.bincount(where, s[key] * busy, buckets) / total) for name, key in (("rows", "rows"), ("KV tokens", "kv_tokens"))}
        return {**found, "watts": (middle, np.bincount(where, s["joules"], buckets) / (edges[1] - edges[0]))}

    def summary(self, goals: dict[str, float] | None = None) -> Summary:
        """The measures of ``presage bench``; inter-token latencies only if tokens were kept."""
        found = summarise(self.records(), goals)
        if not self.tokens:
            found.samples["itl"] = []
        return found


def simulate(
    config: EngineConfig,
    workload: Iterable[Request],
    target: Target,
    *,
    replicas: int = 1,
    route: Route = least_loaded,
    after: Callable[[Request, float], Iterable[Request]] | None = None,
    oracle: Callable[[], TraceOracle] | None = None,
    scheduler: Callable[[], Scheduler] | None = None,
    until: float = math.inf,
    keep_tokens: bool = False,
    timeline: bool = True,
    bursts: bool = True,
    progress: bool = False,
    max_drafts: int = 0,
    **parts: Any,
) -> Result:
    """Run requests (in order of arrival) through ``replicas`` engines of this configuration; returns what happened.

    ``oracle``, ``scheduler``: how to make a replica's own, else a TraceOracle and the policy of the configuration. ``parts`` go to the
    loop: drafter, length, log, latency, each a factory called per replica (``speculation`` makes several at once); ``max_drafts`` nodes a
    step. ``after(request, now)``: requests caused by one that ended (closed loops, sessions).
    ``until``: stop at this virtual time. Ctrl-C ends the run early and keeps its results. Raises ConfigError for a workload out of order.
    """
    if replicas < 1:
        raise ConfigError(f"replicas must be at least 1, got {replicas}", param="replicas")
    out = Collector(keep_tokens, timeline)
    engines = [make_replica(config, target, out, i, oracle, scheduler, parts, max_drafts) for i in range(replicas)]
    driver = VirtualDriver(engines, workload, route, after, bursts)
    begin, interrupted = time.perf_counter(), False
    with _bar(progress, workload, out) as tick:
        try:
            driver.run(until, tick)
        except KeyboardInterrupt:
            interrupted = True
    wall = time.perf_counter() - begin
    rows = out.rows.table()
    start = float(rows["arrival"].min()) if len(rows["arrival"]) else 0.0
    duration = driver.now - start
    return Result(
        ids=out.ids,
        requests=rows,
        steps=out.steps.table(),
        errors=out.errors,
        duration=duration,
        n_steps=out.n_steps,
        turns=driver.turns,
        busy=out.busy,
        joules=out.joules + target.idle_watts * max(0.0, duration * replicas - out.busy),
        wall=wall,
        interrupted=interrupted,
        replicas=replicas,
        tokens=out.token_times() if keep_tokens else {},
    )


def make_replica(
    config: EngineConfig,
    target: Target,
    out: Collector,
    index: int = 0,
    oracle: Callable[[], TraceOracle] | None = None,
    scheduler: Callable[[], Scheduler] | None = None,
    parts: dict[str, Any] | None = None,
    max_drafts: int = 0,
    executor: Callable[..., ModelledExecutor] = ModelledExecutor,
) -> Replica:
    """One virtual engine: the real loop, cache, cutter and policies around a modelled executor."""
    made = {name: make() for name, make in (parts or {}).items()}
    made |= made.pop("speculation", {})
    content = made.pop("content", None)
    table, requests = Table(), dict[int, Request]()
    eos = list(target.eos)
    mind = oracle() if oracle is not None else TraceOracle(eos[0] if eos else None)
    device = executor(target.latency, mind, target.geometry, target.layers, target.depth)
    device.on_step = lambda plan, t0, t1, joules, repeat: out.step(index, plan, t0, t1, joules, repeat)
    (kv,) = block_managers(config, [target.geometry], target.max_model_len, content)
    emitter = RowEmitter(table, requests, out, index)
    settings = loop_config(config, target.max_model_len)
    settings.max_drafts, settings.tables = max_drafts, False
    loop = Loop(
        settings,
        device,
        [kv],
        scheduler() if scheduler is not None else make_scheduler(config.scheduler),
        Cutter(table, requests, eos),
        emitter,  # type: ignore[arg-type]
        table=table,
        requests=requests,
        **made,
    )
    return Replica(loop, device, emitter)


def _bar(show: bool, workload: Iterable[Request], out: Collector) -> AbstractContextManager[Callable[[], None] | None]:
    """A progress line on a terminal, nothing elsewhere."""
    if not show or not sys.stderr.isatty():
        return nullcontext(None)
    return _Bar(len(workload) if hasattr(workload, "__len__") else None, out)  # type: ignore[arg-type]


class _Bar:
    def __init__(self, total: int | None, out: Collector) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} requests/s"), TimeRemainingColumn()
        self.bar, self.out, self.begin = Progress(*columns, console=Console(stderr=True), transient=True), out, time.perf_counter()
        self.task = self.bar.add_task("", total=total, rate=0.0)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return self._tick

    def _tick(self) -> None:
        n = self.out.rows.n
        self.bar.update(self.task, completed=n, rate=n / max(1e-9, time.perf_counter() - self.begin))

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
