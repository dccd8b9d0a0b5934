"""``presage bench serve``: make the requests and their schedule, offer the load, print and save the result."""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from presage import __version__
from presage.bench.attainment import attainment
from presage.bench.config import ServeBench
from presage.bench.fairness import by_tenant, fairness
from presage.bench.jobs import make_jobs, make_workload
from presage.bench.load import Generator, Job, Limits, Run, progress
from presage.bench.measures import METRICS, Record, as_json, parse_goodput, record_json, summarise
from presage.bench.report import serving_report
from presage.bench.rows import write_rows
from presage.bench.window import concurrency, saturated
from presage.bench.wire import Pool
from presage.bench.workloads import Workload
from presage.core.errors import ConfigError


def endpoint(config: ServeBench) -> str:
    """The full address requests go to."""
    return urljoin(config.base_url.rstrip("/") + "/", config.path.lstrip("/"))


def percentiles(text: str) -> list[float]:
    """``"50,99"`` as numbers. Raises ConfigError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= p <= 100 for p in found):
        raise ConfigError(f"metric_percentiles are numbers from 0 to 100, got {text!r}", param="metric_percentiles")
    return found


def metrics(text: str) -> list[str]:
    """``"ttft,e2el"`` as names of measures. Raises ConfigError."""
    found = [word.strip() for word in text.split(",")]
    if not set(found) <= set(METRICS):
        raise ConfigError(f"percentile_metrics are {', '.join(METRICS)}, got {text!r}", param="percentile_metrics")
    return found


def generator(config: ServeBench, jobs: Sequence[Job], show: bool = False, spare: int = 8) -> Generator:
    """A generator for these jobs with the settings' address, headers and limits."""
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    limits = Limits(config.max_concurrency or 0, config.request_timeout, config.client_realtime)
    tick = progress(len(jobs)) if show else lambda record: None
    return Generator(Pool(endpoint(config), spare), jobs, {**headers, **config.header}, limits, tick)


async def _once(config: ServeBench, job: Job) -> Record:
    run = await generator(config.model_copy(update={"client_realtime": False}), [job], spare=1).run()
    return run.records[0]


async def wait_ready(config: ServeBench, job: Job) -> None:
    """Repeat one request until it succeeds. Raises ConfigError with the last failure after ``ready_check_timeout_sec`` seconds."""
    until = time.monotonic() + config.ready_check_timeout_sec
    while True:
        try:
            record = await _once(config, job)
            failure = record.error
        except ConfigError as error:
            failure = error.message
        if not failure:
            return
        if time.monotonic() >= until:
            raise ConfigError(f"{endpoint(config)} does not answer: {failure}", param="base_url")
        await asyncio.sleep(0.5)


async def offer(config: ServeBench, jobs: Sequence[Job], show: bool = False) -> Run:
    """Readiness, warm-up, then the measured run."""
    alone = [replace(job, at=0.0, after=-1, think=0.0) for job in jobs[: max(1, config.num_warmups)]]
    if config.ready_check_timeout_sec > 0 and alone:
        await wait_ready(config, alone[0])
    for i in range(config.num_warmups if alone else 0):
        await _once(config, alone[i % len(alone)])
    return await generator(config, jobs, show).run()


def run_load(config: ServeBench, workload: Workload, codec: Any, show: bool = False) -> Run:
    """Offer a workload to the server. Raises ConfigError if it does not answer."""
    return asyncio.run(offer(config, make_jobs(workload, config, codec), show))


def result(config: ServeBench, run: Run, workload: Workload | None = None) -> dict[str, Any]:
    """Everything worth keeping of a run under vLLM's keys: numbers, settings, machine, the client's own validity."""
    goals, records = parse_goodput(config.goodput), run.records
    summary = summarise(records, goals)
    about = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": config.backend,
        "label": config.label or config.backend,
        "model_id": config.model,
        "tokenizer_id": config.tokenizer or config.model,
        "num_prompts": len(records),
        "request_rate": "inf" if config.request_rate == float("inf") else config.request_rate,
        "burstiness": "inf" if config.burstiness == float("inf") else config.burstiness,
        "max_concurrency": config.max_concurrency,
        "presage": __version__,
        "machine": platform.platform(),
        "metadata": config.metadata,
        "client": {"cpu_share": run.cpu_share, "realtime": run.realtime, "interrupted": run.interrupted},
        # JSON has no infinity; vLLM writes the word as well.
        "config": {k: str(v) if v == float("inf") else v for k, v in config.model_dump(exclude={"api_key", "tenant_keys"}).items()},
    }
    more = as_json(summary, percentiles(config.metric_percentiles))
    more |= {"concurrency": concurrency(records), "saturated": saturated(records)}
    if goals:
        more["attainment"] = attainment(records, goals)
    if workload is not None:
        more["offered_rate"] = None if workload.rate == float("inf") or config.users else workload.rate
    if len({r.tenant for r in records}) > 1:
        more |= {"fairness": fairness(records), "by_tenant": by_tenant(records, goals)}
    return {**about, **more, **(detailed(records) if config.save_detailed else {})}


def detailed(records: Sequence[Record]) -> dict[str, Any]:
    """Per-request lists under vLLM's names, and our records."""
    return {
        "input_lens": [r.n_in for r in records],
        "output_lens": [r.n_out for r in records],
        "ttfts": [r.ttft if r.ok else 0.0 for r in records],
        "itls": [[b - a for a, b in zip(r.chunks, r.chunks[1:])] for r in records],
        "errors": [r.error for r in records],
        "records": [record_json(r) for r in records],
    }


def result_path(config: ServeBench) -> Path:
    """Where the result goes."""
    model = config.model.rstrip("/").split("/")[-1]
    name = config.result_filename or f"{config.backend}-{config.request_rate:g}qps-{model}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    return Path(config.result_dir) / name


def one_run(config: ServeBench, codec: Any) -> tuple[Run, Workload]:
    """Make the workload, offer it, print the report."""
    goals, shown, names = parse_goodput(config.goodput), percentiles(config.metric_percentiles), metrics(config.percentile_metrics)
    workload = make_workload(config, codec)
    if len(workload) < config.num_prompts:
        print(f"note: {config.dataset_name} gives {len(workload)} requests of the {config.num_prompts} asked for")
    run = run_load(config, workload, codec, show=True)
    print(serving_report(summarise(run.records, goals), shown, names=names, run=run, goals=goals), flush=True)
    failures = [r.error for r in run.records if not r.ok]
    if failures:
        print(f"first failure: {failures[0]}")
    return run, workload


def tokenizer(config: ServeBench) -> Any:
    """The tokenizer of the settings. Raises CheckpointError."""
    from presage.tokenize.tokenizer import Tokenizer

    return Tokenizer.load(config.tokenizer or config.model)


def bench_serve(config: ServeBench) -> int:
    """Run the benchmark. Returns 0, or 1 if no request succeeded. Raises ConfigError before anything is sent."""
    run, workload = one_run(config, tokenizer(config))
    if config.save_result or config.save_detailed or config.result_filename:
        path = result_path(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result(config, run, workload)) + "\n", encoding="utf-8")
        print(f"saved to {path}")
    if config.save_records:
        write_rows(run.records, config.save_records)
        print(f"records in {config.save_records}")
    if config.report:
        from presage.bench.page import Shown, write_page

        label = config.label or config.backend
        write_page(config.report, [Shown(label, run.records, workload.rate, result(config, run, workload))], parse_goodput(config.goodput))
        print(f"report in {config.report}")
    return 0 if any(r.ok for r in run.records) else 1
