"""``presage bench latency | throughput | serve | sweep | compare | report``."""

# ruff: noqa: B008 (settings groups are frozen, so one default may serve all calls)
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from presage.bench.config import RandomLengths, ServeBench
from presage.core.config import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from presage.serve.cli import Cache, Executor, Flat, Model, Scheduler, Speculation, bench, engine_config

Positional = Annotated[str, Parameter(name="MODEL")]
Lengths = Annotated[RandomLengths, Flat]


@bench.command
def latency(
    model_name: Positional = "",
    /,
    *,
    batch_size: int = 8,
    num_iters: int = 10,
    num_iters_warmup: int = 2,
    lengths: Lengths = RandomLengths(),
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
    speculation: Speculation = SpeculationConfig(),
) -> int:
    """Time batches that start together, in this process.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    batch_size:
        Requests in a batch.
    num_iters:
        Batches measured.
    num_iters_warmup:
        Batches before them.
    """
    from presage.bench.measures import as_json, summarise
    from presage.bench.offline import TimedEngine
    from presage.bench.offline import latency as run
    from presage.bench.report import latency_lines

    engine = TimedEngine(engine_config(model_name, model, cache, scheduler, executor, speculation=speculation))
    try:
        found = run(engine, batch_size, lengths.input_len, lengths.output_len, num_iters, num_iters_warmup, lengths.seed)
    finally:
        engine.close()
    summary = summarise([r for batch in found for r in batch])
    spans = [max(r.t_done for r in batch) - batch[0].t_sched for batch in found]
    print(f"{num_iters} batches of {batch_size} requests, {lengths.input_len} tokens in and {lengths.output_len} out")
    print(f"Avg latency: {sum(spans) / len(spans):.4f} seconds")
    for name in ("ttft", "tpot", "e2el"):
        print("\n".join(latency_lines(name, summary.samples[name], (99,))))
    _save(lengths.output_json, {"avg_latency": sum(spans) / len(spans), "latencies": spans, **as_json(summary)})
    return 0


@bench.command
def throughput(
    model_name: Positional = "",
    /,
    *,
    num_prompts: int = 64,
    dataset_name: str = "random",
    decode_only: bool = False,
    warmup: bool = True,
    lengths: Lengths = RandomLengths(),
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
    speculation: Speculation = SpeculationConfig(),
) -> int:
    """Run many prompts at once, in this process.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    num_prompts:
        Prompts to run.
    dataset_name:
        Only random: ids of the given lengths.
    decode_only:
        Also measure decoding alone, as the difference of two output lengths.
    warmup:
        Run the same work once before it is measured.
    """
    from presage.bench.offline import TimedEngine, decode_rate
    from presage.bench.offline import throughput as run
    from presage.core.errors import ConfigError

    if dataset_name != "random":
        raise ConfigError(f"bench throughput knows the data set random, got {dataset_name!r}", param="dataset_name")
    config: EngineConfig = engine_config(model_name, model, cache, scheduler, executor, speculation=speculation)
    engine = TimedEngine(config)
    sizes = num_prompts, lengths.input_len, lengths.output_len
    try:
        if warmup:
            run(engine, *sizes, lengths.seed + 1)
        found: dict[str, Any] = run(engine, *sizes, lengths.seed + 2)
        if decode_only:
            found |= decode_rate(engine, *sizes, lengths.seed + 3)
    finally:
        engine.close()
    rate, total, output = found["requests_per_second"], found["tokens_per_second"], found["output_tokens_per_second"]
    print(f"Throughput: {rate:.2f} requests/s, {total:.2f} total tokens/s, {output:.2f} output tokens/s")
    if decode_only:
        print(f"Decode alone: {found['decode_tokens_per_second']:.2f} output tokens/s")
        if num_prompts > config.scheduler.max_num_seqs:
            print(f"note: {num_prompts} prompts do not run at once with max_num_seqs {config.scheduler.max_num_seqs}; prefill does not cancel fully")
    _save(lengths.output_json, found)
    return 0


@bench.command
def serve(*, load: Annotated[ServeBench, Flat] = ServeBench()) -> int:
    """Offer an open-loop load to any OpenAI-compatible server and print what its users would have seen."""
    from presage.bench.serving import bench_serve

    return bench_serve(load)


def _save(path: str | None, data: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")


@bench.command
def sweep(
    *,
    request_rates: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    attainment: float = 0.9,
    tolerance: float = 0.05,
    load: Annotated[ServeBench, Flat] = ServeBench(),
) -> int:
    """Offer the same load at several rates, or search for the largest rate that meets the goals.

    Parameters
    ----------
    request_rates:
        Rates to try; without any, the capacity under --goodput is searched, from --request-rate on.
    attainment:
        Share of requests that must meet all goals.
    tolerance:
        How close the search comes to the capacity, as a share of it.
    """
    from presage.bench.sweep import bench_sweep

    return 0 if bench_sweep(load, request_rates or [], attainment, tolerance).trials else 1


@bench.command
def compare(a: Path, b: Path, /) -> int:
    """Compare two saved results.

    Parameters
    ----------
    a:
        Result of a run, as --save-result writes it.
    b:
        Result of the other run.
    """
    from presage.bench.compare import comparison, load_result

    print(comparison(load_result(a), load_result(b), (a.stem, b.stem)))
    return 0


@bench.command
def report(
    results: Annotated[list[Path], Parameter(consume_multiple=True, negative=())], /, *, output: Path = Path("report.html"),
    goodput: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
) -> int:  # fmt: skip
    """Make one HTML page of saved results (with --save-detailed) or tables of records.

    Parameters
    ----------
    results:
        Results as JSON, or records as .csv or .parquet.
    output:
        The page.
    goodput:
        Goals in milliseconds: ttft:200 tpot:50 e2el:5000; those of the first result by default.
    """
    from presage.bench.compare import shown
    from presage.bench.measures import parse_goodput
    from presage.bench.page import write_page

    runs = [shown(path) for path in results]
    words = goodput if goodput is not None else (runs[0].about.get("config") or {}).get("goodput", [])
    write_page(output, runs, parse_goodput(words))
    print(f"report in {output}")
    return 0
