"""``presage bench sweep``: the same requests at several rates, or at whatever rates the search for the capacity asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from presage.bench.attainment import attainment
from presage.bench.capacity import Capacity, capacity_search
from presage.bench.config import ServeBench
from presage.bench.measures import parse_goodput
from presage.bench.page import Shown, write_page
from presage.bench.serving import one_run, result, tokenizer
from presage.core.errors import ConfigError

SALTED = ("vllm", "presage")
"""Kinds of server known to take ``cache_salt``; another may refuse a request with a field it does not know."""


def trial_config(config: ServeBench, rate: float, i: int) -> ServeBench:
    """Settings of trial ``i``: its rate, and contents that the trials before did not leave in the server's prefix cache, where possible."""
    more: dict[str, Any] = {"request_rate": rate, "label": f"{rate:.4g}/s"}
    if i and config.dataset_name == "random":
        more["seed"] = config.seed + 7919 * i
    if config.backend in SALTED:
        more["extra_body"] = {"cache_salt": f"trial-{config.seed}-{i}", **config.extra_body}
    return config.model_copy(update=more)


class Trials:
    """Runs at rates, one after another; keeps what each left."""

    def __init__(self, config: ServeBench) -> None:
        self.config, self.codec = config, tokenizer(config)
        self.goals = parse_goodput(config.goodput)
        self.runs: list[Shown] = []

    def run(self, rate: float) -> float:
        """Offer ``rate`` requests/s; the share that met all goals (1 without goals)."""
        config = trial_config(self.config, rate, len(self.runs))
        print(f"--- {rate:.4g} requests/s")
        run, workload = one_run(config, self.codec)
        self.runs.append(Shown(config.label or "", run.records, rate, result(config, run, workload)))
        return attainment(run.records, self.goals)["all"]

    def save(self) -> None:
        """Results as JSON lines, and the page, where the settings ask for them."""
        if self.config.save_result or self.config.save_detailed or self.config.result_filename:
            path = Path(self.config.result_dir) / (self.config.result_filename or f"{self.config.backend}-sweep.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(r.about) + "\n" for r in self.runs), encoding="utf-8")
            print(f"saved to {path}")
        if self.config.report:
            write_page(self.config.report, self.runs, self.goals)
            print(f"report in {self.config.report}")


def bench_sweep(config: ServeBench, rates: Sequence[float], attain: float = 0.9, tolerance: float = 0.05) -> Capacity:
    """Trials at ``rates``; without any, the capacity: the largest rate at which a share ``attain`` of requests meets the goals.

    Raises ConfigError for a search without goals, or if the server is not there.
    """
    trials = Trials(config)
    if any(not rate > 0 for rate in rates):
        raise ConfigError(f"rates are positive, got {list(rates)}", param="request_rates")
    if not rates and not trials.goals:
        raise ConfigError("a search for the capacity needs goals: --goodput ttft:MS tpot:MS", param="goodput")
    try:
        if rates:
            shares = [(rate, trials.run(rate)) for rate in sorted(rates)]
            passed = [rate for rate, share in shares if share >= attain]
            found = Capacity(max(passed, default=0.0) if trials.goals else math.nan, shares)
        else:
            start = config.request_rate if math.isfinite(config.request_rate) else 1.0
            found = capacity_search(trials.run, attain, start, tolerance)
    finally:
        trials.save()
    if trials.goals:
        how = "highest rate tried" if rates else "capacity"
        noise = " (noisy: a lower rate failed; take longer trials)" if found.noisy else ""
        print(f"Goodput ({how} with {attain:.0%} within the goals): {found.rate:.4g} requests/s{noise}")
    return found
