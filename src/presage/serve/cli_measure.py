"""``presage measure energy``: joules per request, per token and per right answer, measured where a counter can be read, else modelled."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from cyclopts import App, Parameter
from pydantic import Field

from presage.core.config import CacheConfig, EngineConfig, ExecutorConfig, Group, ModelConfig, SchedulerConfig, SpeculationConfig
from presage.serve.cli import Cache, Executor, Flat, Model, Scheduler, Speculation, app, engine_config

if TYPE_CHECKING:
    from presage.bench.ask import Answers
    from presage.bench.energy import Energy, Source

measure = App(name="measure", help="Measure what a run costs beside time.")
app.command(measure)

LOCAL = ("localhost", "127.0.0.1", "::1")
Ask = Callable[[], "Answers"]


class EnergyRun(Group):
    """The load, and where joules come from."""

    url: str = ""
    """Address of an OpenAI-compatible server to ask, instead of an engine in this process."""
    api_key: str = ""
    """Key to send to it."""
    task: str = ""
    """Questions with right answers, .jsonl; random prompts without one."""
    prompt_field: str = "prompt"
    """Field of a row that holds the question."""
    answer_field: str = "answer"
    """Field that holds the right answer."""
    score: Literal["exact", "prefix", "contains", "number"] = "contains"
    """When an answer is right: its first line is equal, it begins with it, it contains it, its last number is equal."""
    num_prompts: int = Field(32, ge=1)
    """Requests to send."""
    input_len: int = Field(128, ge=1)
    """Tokens of a random prompt."""
    output_len: int = Field(64, ge=1)
    """Tokens asked for; random prompts get exactly so many."""
    concurrency: int = Field(8, ge=1)
    """Requests in flight."""
    source: Literal["auto", "rapl", "nvml", "modelled"] = "auto"
    """Where joules come from. auto: RAPL, for a server on this machine NVML first; what cannot be read is modelled."""
    hardware: str = "epyc-zen4-2c"
    """Entry of the hardware table whose watts are used when joules are modelled."""
    watts: float | None = Field(None, gt=0)
    """Watts at full use, instead of the entry's."""
    utilisation: float = Field(1.0, gt=0, le=1)
    """For a server whose joules are modelled: share of the device in use while a request is in flight."""
    gpus: list[int] = []
    """Indices of the GPUs that NVML sums; all without any."""
    idle_seconds: float = Field(1.0, gt=0)
    """How long the draw at rest is measured before the run."""
    output_json: str | None = None
    """File for the numbers."""


@measure.command
def energy(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    run: Annotated[EnergyRun, Flat] = EnergyRun(),  # noqa: B008 (settings groups are frozen)
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
    speculation: Speculation = SpeculationConfig(),
) -> int:
    """Joules per request, per token and per right answer, of an engine here or of a server; every line says measured or modelled.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny; with --url the name to send (its first model by default).
    """
    from presage.bench.ask import read_task

    rows = read_task(Path(run.task), run.prompt_field, run.answer_field, run.num_prompts) if run.task else []
    if run.url:
        found, sent = _server(run, model_name, rows)
    else:
        found, sent = _engine(run, engine_config(model_name, model, cache, scheduler, executor, speculation=speculation), rows)
    failed = f", {sent - found.requests} requests failed" if sent > found.requests else ""
    print(f"{found.requests} requests, {found.n_in} tokens in, {found.n_out} out, {found.seconds:.2f} s{failed}")
    print(f"joules are {'modelled' if found.source == 'modelled' else 'measured'}: {found.about}")
    print("\n".join(found.lines()))
    if run.output_json is not None:
        Path(run.output_json).write_text(json.dumps(found.as_dict()) + "\n", encoding="utf-8")
    return 0


def _server(run: EnergyRun, name: str, rows: list[tuple[str, str]]) -> tuple[Energy, int]:
    from presage.bench.ask import Server
    from presage.bench.datasets import random_ids

    server = Server(run.url, name, run.api_key)
    # Ids below 1000 are in every vocabulary; the first few hundred may be bytes or control tokens.
    prompts: list[Any] = [q for q, _ in rows] or [[256 + i for i in ids] for ids in random_ids(run.num_prompts, run.input_len, 744, 0)]
    ask = lambda some: server.ask(some, run.output_len, run.concurrency, ignore_eos=not rows)  # noqa: E731
    ask(prompts[:1])
    # A counter of this machine says nothing about a server on another one.
    tries = ("nvml", "rapl") if urlsplit(run.url).hostname in LOCAL else ()
    how = f"time with requests in flight, {run.utilisation:.0%} of the device"
    return _metered(run, rows, lambda: ask(prompts), _source(run, tries, lambda: run.utilisation * server.used(), how))


def _engine(run: EnergyRun, config: EngineConfig, rows: list[tuple[str, str]]) -> tuple[Energy, int]:
    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    from presage.bench.ask import Engine
    from presage.bench.energy import process_use
    from presage.core.sampling_params import SamplingParams

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    engine = Engine(config)
    try:
        prompts = engine.encode([q for q, _ in rows]) if rows else engine.prompts(run.num_prompts, run.input_len, 1)
        params = SamplingParams(temperature=0.0, max_tokens=run.output_len, ignore_eos=not rows)
        engine.ask(engine.prompts(1, 16, 2), SamplingParams(temperature=0.0, max_tokens=4), 1)
        source = _source(run, ("rapl",), process_use(cores), f"processor time of this process over {cores} cores")
        return _metered(run, rows, lambda: engine.ask(prompts, params, run.concurrency), source)
    finally:
        engine.close()


def _source(run: EnergyRun, tries: tuple[str, ...], used: Callable[[], float], how: str) -> Source:
    from presage.bench.energy import Modelled, open_source
    from presage.simulate.latency.hardware import hardware

    entry = hardware(run.hardware)
    device = entry if run.watts is None else replace(entry, watts=run.watts)
    return open_source(run.source, lambda: Modelled(device, used, how), tries, run.gpus, lambda text: print(text, file=sys.stderr))


def _metered(run: EnergyRun, rows: list[tuple[str, str]], ask: Ask, source: Source) -> tuple[Energy, int]:
    """The draw at rest, then the run under the meter; answers are judged afterwards."""
    from presage.bench.ask import SCORES
    from presage.bench.energy import Energy, Meter, idle_watts

    idle = idle_watts(source, run.idle_seconds)
    with Meter(source) as meter:
        records, texts = ask()
    right = [r.ok and SCORES[run.score](text, answer) for r, text, (_, answer) in zip(records, texts, rows)]
    return Energy.of(meter, records, idle, sum(right) if rows else None), len(records)
