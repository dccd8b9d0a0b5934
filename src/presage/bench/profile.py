"""Where the time of a step goes: ``presage profile step``.

Real steps of a built engine, the same step many times. Clocks stand around the stages of the walk (``execute.walk.layers`` yields after
each), not in it; the undisturbed step is measured in turns with the clocked one, and the loop around it in the running engine.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from presage.bench.datasets import random_ids
from presage.bench.steps import FixedSteps
from presage.bench.timed_ops import TimedOps
from presage.bench.traffic import Work, ends_work, stage_work
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError, PresageError
from presage.core.plan import StepPlan
from presage.core.request import Emission, Request
from presage.core.sampling_params import SamplingParams
from presage.engine.assemble import error_of
from presage.engine.build import Engine, build_engine, in_passing_thread, load_model, thread_count
from presage.execute.batch import Batch
from presage.execute.executor import TorchExecutor, out_rows
from presage.execute.walk import layers
from presage.layers.state import State

LOOP_TOKENS, LEAST_TOKENS = 24, 8
READ_BYTES = 512 << 20


@dataclass(slots=True)
class Part:
    """A part of a step: ``seconds`` over its ``calls`` (median over repeats), bytes it must read, operations it must do."""

    name: str
    calls: int
    seconds: float
    nbytes: int = 0
    operations: int = 0


@dataclass(slots=True)
class StepProfile:
    """One case. ``step``: seconds of the undisturbed step; ``loop``: seconds between steps in a running engine (nan: not measured);
    ``read``: plain read bandwidth in bytes per second, the mean of before and after. ``kernels``: by operation, if asked."""

    batch: int
    context: int
    known: int
    nodes: int
    parts: list[Part]
    step: float
    loop: float
    read: float
    kernels: list[Part] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole step."""
        return sum(p.nbytes for p in self.parts)

    @property
    def operations(self) -> int:
        """Operations of the whole step."""
        return sum(p.operations for p in self.parts)


@dataclass(frozen=True, slots=True)
class Case:
    """What to profile: ``batch`` sequences of ``context`` tokens; each brings ``known`` tokens and a chain of ``nodes`` draft nodes."""

    batch: int
    context: int
    known: int = 1
    nodes: int = 0

    @property
    def rows(self) -> int:
        """Rows of one sequence."""
        return self.known + self.nodes


def read_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes per second of a parallel sum over memory much larger than the caches, the best of a few."""

    def measure() -> float:
        torch.set_num_threads(threads)
        data = torch.ones(READ_BYTES // 4)
        best = min(_seconds(data.sum) for _ in range(repeats))
        torch.set_num_threads(1)
        return data.nbytes / best

    # OpenMP keeps a pool per calling thread; this one must not stay behind beside the kernels'.
    return in_passing_thread(measure)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def clocked(executor: TorchExecutor, plan: StepPlan, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Run a whole-stack step as the executor does and return the seconds of each part, in order of first use."""
    spent: dict[str, float] = defaultdict(float)
    run, model, last = executor.run, executor.model, clock()

    def lap(name: str) -> None:
        nonlocal last
        now = clock()
        spent[name] += now - last
        last = now

    with torch.inference_mode():
        batch = Batch.of(plan, plan.ids, executor.geometry, run.ops)
        lap("assemble")
        h = run.work.take("h", len(batch), model.params.d, torch.float32)
        model.embed(batch.ids, batch.positions, h)
        state = State(batch.rows, h)
        lap("embed")
        for stage, ticket in layers(run, state, batch, (0, 0), (len(model.layers), 0)):
            if ticket is not None:
                ticket.wait()
            lap(stage.name)
        row, span, node = out_rows(plan)
        if len(row):
            logits = model.head(h if len(row) == len(h) else h[torch.from_numpy(row).long()], run.work)
            lap("head")
            executor.sampler.judge(logits, plan, span, node)
            lap("sampling")
    return dict(spent)


def step_work(executor: TorchExecutor, plan: StepPlan) -> tuple[dict[str, Work], Counter[str]]:
    """Bytes and operations of each part of a step, and how often it runs. Runs the step, since a router chooses what is read."""
    work: dict[str, Work] = defaultdict(Work)
    calls: Counter[str] = Counter()
    run = executor.run
    with torch.inference_mode():
        batch = Batch.of(plan, plan.ids, executor.geometry, run.ops)
        h = run.work.take("h", len(batch), executor.model.params.d, torch.float32)
        executor.model.embed(batch.ids, batch.positions, h)
        state = State(batch.rows, h)
        count = len(executor.model.layers)
        for (stage, _), at in zip(layers(run, state, batch, (0, 0), (count, 0)), _places(executor), strict=True):
            work[stage.name] += stage_work(executor, plan, at, stage, state)
            calls[stage.name] += 1
    for name, part in ends_work(executor, plan):
        work[name] += part
        calls[name] += 1
    return work, calls


def _places(executor: TorchExecutor) -> list[int]:
    return [i for i, layer in enumerate(executor.model.layers) for _ in layer.stages]


def profile_case(executor: TorchExecutor, case: Case, threads: int, repeats: int = 20, timed: TimedOps | None = None) -> StepProfile:
    """Profile one case on an executor whose thread is not running. ``timed``: the model's operations, if they are to be listed."""
    fixed = FixedSteps(executor, case.batch, case.context, case.rows)
    try:
        plan = fixed.plan(known=case.known, nodes=case.nodes)
        work, calls = step_work(executor, plan)
        fixed.run(plan)
        before = read_bandwidth(threads)
        whole: list[float] = []
        clocks: list[dict[str, float]] = []
        kernels: list[dict[str, list[float]]] = []
        for _ in range(repeats):
            whole.append(fixed.seconds(plan))
            if timed is not None:
                timed.take()
            clocks.append(clocked(executor, plan))
            if timed is not None:
                kernels.append(timed.take())
        read = (before + read_bandwidth(threads)) / 2
    finally:
        fixed.close()
    step = statistics.median(whole)
    parts = _parts(clocks, work, calls)
    parts.append(Part("other", 1, step - sum(p.seconds for p in parts)))
    return StepProfile(case.batch, case.context, case.known, case.nodes, parts, step, float("nan"), read, _kernels(kernels))


def _parts(clocks: Sequence[dict[str, float]], work: dict[str, Work], calls: Counter[str]) -> list[Part]:
    parts = []
    for name in clocks[0]:
        done = work.get(name, Work())
        parts.append(Part(name, calls.get(name, 1), statistics.median(c[name] for c in clocks), done.nbytes, done.operations))
    return parts


def _kernels(runs: Sequence[dict[str, list[float]]]) -> list[Part]:
    if not runs:
        return []
    parts = [Part(name, len(runs[0][name]), statistics.median(sum(r.get(name, [])) for r in runs)) for name in runs[0]]
    return sorted(parts, key=lambda p: -p.seconds)


class Stopwatch:
    """A sink that notes, at each emission of a watched request, the wall clock and the seconds spent in steps so far."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.left: set[str] = set()
        self.marks: list[tuple[float, float]] = []
        self.failure: PresageError | None = None

    def __call__(self, emissions: list[Emission]) -> None:
        """Take a step's emissions."""
        mine = [e for e in emissions if e.id in self.left]
        self.failure = next((error_of(e.error) for e in mine if e.error is not None), self.failure)
        if mine and self.engine is not None:
            self.marks.append((time.monotonic(), self.engine.loop.stats["step_seconds"]))
        self.left -= {e.id for e in mine if e.finish or e.error is not None}


def loop_seconds(engine: Engine, watch: Stopwatch, case: Case) -> float:
    """Median seconds between two decode steps that are not inside a step: the loop's turn and the hand-over, prompts of ``context`` tokens.

    The prompts share their prefix, so that all but the first find it cached. nan if the model's length leaves no room for a few steps.
    """
    info, watch.engine = engine.info, engine
    tokens = min(LOOP_TOKENS, info.max_model_len - max(1, case.context))
    if tokens < LEAST_TOKENS:
        return float("nan")
    shared = random_ids(1, max(1, case.context), info.vocab_size, case.context + 1, frozenset(info.eos_ids))[0]
    for name, count in (("first", 1), ("loop", case.batch)):
        watch.left, watch.marks = {f"{name}-{case}-{i}" for i in range(count)}, []
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
        for request in sorted(watch.left):
            engine.add(Request(id=request, prompt=np.array(shared, np.int32), sampling=params, arrival=time.monotonic()))
        while watch.left:
            engine.driver.step()
        if watch.failure is not None:
            raise watch.failure
    gaps = [(b[0] - a[0]) - (b[1] - a[1]) for a, b in zip(watch.marks[2:-1], watch.marks[3:], strict=False)]
    return statistics.median(gaps)


def sized(config: EngineConfig, cases: Sequence[Case]) -> EngineConfig:
    """The configuration with a KV cache just large enough for the cases, unless it names a size, and seats for the largest batch."""
    seats = max(c.batch for c in cases)
    scheduler = config.scheduler.model_copy(update={"max_num_seqs": max(seats, config.scheduler.max_num_seqs)})
    cache = config.cache
    if cache.num_gpu_blocks_override is None and cache.kv_cache_memory is None:
        need = max(c.batch * (-(-(c.context + max(c.rows, LOOP_TOKENS)) // cache.block_size) + 1) for c in cases)
        cache = cache.model_copy(update={"num_gpu_blocks_override": need + 64})
    return config.model_copy(update={"scheduler": scheduler, "cache": cache})


def profile_steps(config: EngineConfig, cases: Sequence[Case], repeats: int = 20, kernels: bool = False) -> list[StepProfile]:
    """Profile all cases on one engine. ``kernels`` builds the model on timed operations instead, without the loop around it.

    Raises ConfigError for cases the model or the settings cannot hold, and the typed errors of loading.
    """
    if not cases or repeats < 1:
        raise ConfigError("nothing to profile: name at least one batch size and one repeat")
    config, threads = sized(config, cases), thread_count(config)
    if kernels:
        executor, timed = timed_executor(config, TimedOps)
        return [profile_case(executor, case, threads, repeats, timed) for case in cases]
    watch = Stopwatch()
    engine = build_engine(config, watch, progress=True)
    try:
        if (longest := max(c.context + c.rows for c in cases)) > engine.info.max_model_len:
            raise ConfigError(f"{longest} tokens are more than the model's length of {engine.info.max_model_len}", param="context")
        loops = [loop_seconds(engine, watch, case) for case in cases]
    finally:
        engine.close()
    found = [profile_case(engine.executor, case, threads, repeats) for case in cases]
    return [replace(profile, loop=loop) for profile, loop in zip(found, loops, strict=True)]


Timed = TypeVar("Timed", bound=TimedOps)


def timed_executor(config: EngineConfig, wrap: Callable[[Any], Timed]) -> tuple[TorchExecutor, Timed]:
    """An executor, not started, on a model whose operations are timed by what ``wrap`` puts around them."""
    from presage.core.kv import KVGeometry
    from presage.execute.sampling.sampler import Sampler

    _, model, _ = in_passing_thread(lambda: load_model(config, wrap=wrap))
    groups = model.kv_groups(config.cache.block_size, config.cache.kv_cache_dtype)
    blocks = config.cache.num_gpu_blocks_override
    if blocks is None:
        raise ConfigError("timing kernels sizes the KV cache itself; leave out kv_cache_memory", param="kv_cache_memory")
    geometry = KVGeometry(groups=groups, num_blocks=(blocks,) * len(groups))
    executor = TorchExecutor(model, geometry, Sampler(model.vocab_size), depth=1, kv_cache_dtype=config.cache.kv_cache_dtype)
    return executor, model.ops
