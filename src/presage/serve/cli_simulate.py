"""``presage simulate``: a workload through virtual engines on hardware one need not have; ``presage profile fit``: prices from a real one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from presage.core.config import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from presage.core.errors import ConfigError
from presage.serve.cli import Cache, Executor, Flat, Model, Scheduler, Speculation, app, engine_config
from presage.serve.cli_profile import profile

if TYPE_CHECKING:
    from presage.bench.workloads import Workload
    from presage.simulate.run import Result, Target


@dataclass(frozen=True)
class Machine:
    """What runs it."""

    hardware: str = "h100"
    """Device by name; an unknown one is answered with the list."""
    tensor_parallel_size: int = 1
    """Devices a replica is split over."""
    replicas: int = 1
    """Engines; requests go to the one with the fewest."""
    latency: str = "roofline"
    """How steps are priced: roofline, the JSON file of ``presage profile fit``, or a folder of LLMServingSim's operator tables."""
    dtype: str = "bfloat16"
    """Format of weights and products: bfloat16, fp8, int8, int4, ..."""
    max_model_len: int | None = None
    """Longest prompt plus output; the model's by default."""
    gpu_memory_utilization: float = 0.9
    """Share of a device's memory for weights and KV."""
    acceptance_rate: float | None = None
    """With --speculative-config: the probability that a drafted token is right, instead of drafting from contents the trace may not have."""
    draft_ms: float = 0.0
    """Milliseconds of drafting in a step that verifies drafts."""


@dataclass(frozen=True)
class Load:
    """What it is asked."""

    workload: str = "random"
    """random (drawn lengths, needs no data), or the name of a recorded workload; an unknown one is answered with the list."""
    dataset_path: str = "data"
    """Folder of the data sets, or of this one, or its file."""
    num_prompts: int | None = None
    """Requests; 1000 random ones or all recorded ones by default."""
    random_input_len: int = 1024
    """Prompt tokens of a random request."""
    random_output_len: int = 128
    """Output tokens of a random request."""
    random_range_ratio: float = 0.0
    """Random lengths vary by plus or minus this share of themselves."""
    request_rate: float | None = None
    """Requests per second: recorded arrivals are stretched to it, others are drawn (Poisson), or come all at once without it."""
    replay_speed: float = 1.0
    """Recorded arrivals so many times as fast."""
    max_concurrency: int | None = None
    """A closed loop of so many users instead of arrivals."""
    seed: int = 0
    """Of drawn arrivals and acceptances."""


@app.command
def simulate(
    model: str,
    /,
    *,
    machine: Annotated[Machine, Flat] = Machine(),
    load: Annotated[Load, Flat] = Load(),
    goodput: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    save_records: Path | None = None,
    html: Path | None = None,
    as_json: Annotated[Path | None, Parameter(name="--json")] = None,
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(max_num_batched_tokens=2048, max_num_seqs=256, max_waiting=1 << 30),
    speculation: Speculation = SpeculationConfig(),
) -> int:
    """Run a workload through the engine's own loop and policies in virtual time. Ctrl-C ends early and keeps the results.

    Parameters
    ----------
    model:
        A config.json, the folder it lies in, or presage-tiny; no weights are read.
    goodput:
        Goals in milliseconds: ttft:200 tpot:50 e2el:5000.
    save_records:
        File for a row per request, .parquet or .csv.
    html:
        File for the report with its plots.
    as_json:
        File for the figures.
    """
    from presage.bench.measures import parse_goodput
    from presage.simulate.targets import make_target, shape_of

    config = engine_config("", ModelConfig(), cache, scheduler, ExecutorConfig(), speculation=speculation)
    shape = shape_of(model, machine.dtype, "int8" if cache.kv_cache_dtype == "int8" else "bfloat16")
    target = make_target(
        config, shape, machine.hardware, tp=machine.tensor_parallel_size, latency=machine.latency, dtype=machine.dtype,
        max_model_len=machine.max_model_len, memory_utilization=machine.gpu_memory_utilization,
    )  # fmt: skip
    work = _workload(load)
    result = _run(config, target, work, machine, load, shape.vocab)
    return _show(result, target, work, parse_goodput(goodput or []), save_records, html, as_json)


def _workload(load: Load) -> Workload:
    from presage.bench.workloads import at_rate, closed_loop, replayed, with_rate

    w = _asked(load)
    if load.max_concurrency is not None:
        return closed_loop(w, load.max_concurrency)
    if load.request_rate is not None:
        return at_rate(w, load.request_rate) if w.duration > 0 else with_rate(w, load.request_rate, seed=load.seed)
    return replayed(w, load.replay_speed)


def _asked(load: Load) -> Workload:
    import numpy as np

    from presage.bench.datasets import random_lengths
    from presage.bench.workloads import Workload, read_workload

    if load.num_prompts is not None and load.num_prompts < 1:
        raise ConfigError(f"num_prompts must be at least 1, got {load.num_prompts}", param="num_prompts")
    if load.workload == "random":
        lengths = load.random_input_len, load.random_output_len, load.random_range_ratio
        n = 1000 if load.num_prompts is None else load.num_prompts
        return Workload("random", np.zeros(n), *random_lengths(n, *lengths, load.seed))
    w = read_workload(load.workload, load.dataset_path)
    return w.first(load.num_prompts) if load.num_prompts is not None else w


def _run(config: EngineConfig, target: Target, work: Workload, machine: Machine, load: Load, vocab: int) -> Result:
    from dataclasses import replace

    from presage.bench.workloads import Requests
    from presage.simulate.oracle import LawOracle, TraceOracle
    from presage.simulate.run import simulate as run
    from presage.simulate.speculation import Drafting, drafting

    requests, rate = Requests(work, replies=True), machine.acceptance_rate
    parts: dict[str, Any] = {}
    if drafting(config, vocab, rate):
        parts = {"speculation": lambda: drafting(config, vocab, rate), "max_drafts": config.speculation.max_draft_tokens}
        target = replace(target, latency=Drafting(target.latency, machine.draft_ms / 1e3))
    return run(
        config, requests, target, replicas=machine.replicas, after=requests.after if (work.after >= 0).any() else None,
        oracle=TraceOracle if rate is None else lambda: LawOracle(rate, load.seed), progress=True, **parts,
    )  # fmt: skip


def _show(
    result: Result, target: Target, work: Workload, goals: dict[str, float], save_records: Path | None, html: Path | None, as_json: Path | None
) -> int:  # fmt: skip
    """Print the report, write what was asked for."""
    from presage.bench.measures import as_json as plain
    from presage.bench.page import Shown, write_page
    from presage.bench.report import line, serving_report
    from presage.bench.rows import write_rows

    summary, version = result.summary(goals or None), str(getattr(target.latency, "version", type(target.latency).__name__))
    print(serving_report(summary, title=" Simulated Serving Result ", names=("ttft", "tpot", "e2el")))
    print(line("Energy (kJ):", result.joules / 1e3))
    print(line("Energy per output token (J):", result.joules / max(1, summary.n_out)))
    print(line("Steps:", result.n_steps))
    print(line("Share of time a step runs (%):", 100 * result.busy / max(1e-9, result.duration * result.replicas)))
    print(line("Simulated requests per second here:", result.requests_per_second))
    print(f"prices: {version}" + ("\nnote: interrupted; requests that had not ended are missing" if result.interrupted else ""))
    records = result.records()
    if save_records is not None:
        write_rows(records, save_records)
    if html is not None:
        about = {"workload": work.name, "prices": version, "replicas": result.replicas}
        write_page(html, [Shown("simulated", records, work.rate, about, result.timeline(), result.joules)], goals, "Simulated serving")
    if as_json is not None:
        figures = {**plain(summary), "joules": result.joules, "steps": result.n_steps, "prices": version}
        as_json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 130 if result.interrupted else 0


@profile.command
def fit(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    output: Path = Path("fit.json"),
    seconds: float = 60.0,
    idle_watts: float = 0.0,
    watts: float = 0.0,
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
) -> int:
    """Measure this engine on this machine and write prices of its steps, for ``presage simulate --latency``.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    output:
        File for the fit.
    seconds:
        How long to measure.
    idle_watts:
        Power while nothing runs, if known: it goes into the fit.
    watts:
        Power while steps run, if known.
    """
    from tempfile import TemporaryDirectory

    from presage.core.config import ObservabilityConfig
    from presage.engine.build import build_engine
    from presage.kernels.cpu.environment import prepare_environment
    from presage.simulate.record import profile as measure

    prepare_environment()
    with TemporaryDirectory() as folder:
        observe = ObservabilityConfig(decision_log=folder)
        config = engine_config(model_name, model, cache.model_copy(update={"enable_prefix_caching": False}), scheduler, executor, observe=observe)
        engine = build_engine(config, lambda emissions: None, progress=True)
        fitted = measure(engine, seconds, power=(idle_watts, watts))
        engine.close()
    fitted.save(output)
    about = fitted.about
    print(f"{about['steps']} steps; error median {about['median']:.1%}, p95 {about['p95']:.1%}, bias {about['bias']:+.1%}; written to {output}")
    return 0
