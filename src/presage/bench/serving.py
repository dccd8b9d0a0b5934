"""``presage bench serve``: make the prompts and the schedule, offer the load, print and save the result."""

from __future__ import annotations

import asyncio
import json
import platform
import time
from pathlib import Path
from typing import Any

from presage import __version__
from presage.bench.arrivals import arrival_times
from presage.bench.config import ServeBench
from presage.bench.datasets import Sample, random_samples, sharegpt_samples
from presage.bench.load import run_load
from presage.bench.measures import Record, as_json, parse_goodput, record_json, summarise
from presage.bench.report import serving_report
from presage.core.errors import ConfigError


def make_samples(config: ServeBench) -> list[Sample]:
    """The prompts. Raises ConfigError if the tokenizer or the file cannot be had."""
    from presage.tokenize.tokenizer import Tokenizer

    codec = Tokenizer.load(config.tokenizer or config.model)
    if config.dataset_name == "random":
        lengths = config.random_input_len, config.random_output_len, config.random_range_ratio, config.random_prefix_len
        return random_samples(codec, config.num_prompts, *lengths, config.seed)
    if config.dataset_path is None:
        raise ConfigError("the sharegpt data set needs --dataset-path FILE", param="dataset_path")
    return sharegpt_samples(codec, config.dataset_path, config.num_prompts, config.sharegpt_output_len, config.max_model_len, config.seed)


def percentiles(text: str) -> list[float]:
    """``"50,99"`` as numbers. Raises ConfigError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= p <= 100 for p in found):
        raise ConfigError(f"metric_percentiles are numbers from 0 to 100, got {text!r}", param="metric_percentiles")
    return found


def result(config: ServeBench, records: list[Record]) -> dict[str, Any]:
    """Everything worth keeping of a run: numbers, settings, machine."""
    summary = as_json(summarise(records, parse_goodput(config.goodput)), percentiles(config.metric_percentiles))
    about = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "presage": __version__,
        "machine": platform.platform(),
        # JSON has no infinity; vLLM writes the word as well.
        "config": {k: str(v) if v == float("inf") else v for k, v in config.model_dump(exclude={"api_key"}).items()},
    }
    return {**about, **summary, **({"records": [record_json(r) for r in records]} if config.save_detailed else {})}


def result_path(config: ServeBench) -> Path:
    """Where the result goes."""
    model = config.model.rstrip("/").split("/")[-1]
    name = config.result_filename or f"{config.backend}-{config.request_rate:g}qps-{model}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    return Path(config.result_dir) / name


def bench_serve(config: ServeBench) -> int:
    """Run the benchmark. Returns 0, or 1 if no request succeeded. Raises ConfigError before anything is sent."""
    goals, shown = parse_goodput(config.goodput), percentiles(config.metric_percentiles)
    at = arrival_times(config.num_prompts, config.request_rate, config.burstiness, config.seed)
    records = asyncio.run(run_load(config, make_samples(config), at))
    summary = summarise(records, goals)
    print(serving_report(summary, shown), flush=True)
    if summary.failed:
        print(f"first failure: {next(r.error for r in records if not r.ok)}")
    if config.save_result or config.save_detailed or config.result_filename:
        path = result_path(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result(config, records)) + "\n", encoding="utf-8")
        print(f"saved to {path}")
    return 0 if summary.completed else 1
