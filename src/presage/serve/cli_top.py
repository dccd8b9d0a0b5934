"""``presage top``: a live view of a running server, from its /metrics page."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from presage.core.errors import ConfigError
from presage.serve.cli import app

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PREFIXES = ("presage:", "vllm:")
BARS = " ▁▂▃▄▅▆▇█"
WINDOW = 30.0
"""Seconds over which rates and percentiles are taken."""
LATENCIES = {
    "TTFT": "time_to_first_token_seconds",
    "TPOT": "request_time_per_output_token_seconds",
    "ITL": "inter_token_latency_seconds",
    "queue": "request_queue_time_seconds",
    "E2E": "e2e_request_latency_seconds",
}
RATES = {"generated": "generation_tokens_total", "prompt": "prompt_tokens_total", "steps": "engine_steps_total"}


@dataclass(slots=True)
class Sample:
    """One reading. ``values``: by name without prefix, summed over models; ``labelled``: name -> label's value -> number, for families with a
    label of their own; ``buckets``: histogram -> upper bound -> count up to it."""

    at: float
    model: str = ""
    values: dict[str, float] = field(default_factory=dict)
    labelled: dict[str, dict[str, float]] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)


def read(page: str, at: float) -> Sample:
    """A sample from the page's text. Raises ConfigError if it is no page of Prometheus metrics of an engine."""
    from prometheus_client.parser import text_string_to_metric_families

    sample = Sample(at)
    try:
        found = [s for family in text_string_to_metric_families(page) for s in family.samples]
    except ValueError:
        found = []
    # A server may give every family under both prefixes.
    prefix = next((p for p in PREFIXES if any(s.name.startswith(p) for s in found)), None)
    if prefix is None:
        raise ConfigError("this is no page of an engine's metrics", param="url")
    for s in found:
        if s.name.startswith(prefix):
            _take(sample, s.name.removeprefix(prefix), dict(s.labels), s.value)
    return sample


def _take(sample: Sample, name: str, labels: dict[str, str], value: float) -> None:
    sample.model = labels.pop("model_name", sample.model)
    labels.pop("engine", None)
    if "le" in labels:
        bucket, bound = sample.buckets.setdefault(name.removesuffix("_bucket"), {}), float(labels["le"])
        bucket[bound] = bucket.get(bound, 0.0) + value
        return
    sample.values[name] = sample.values.get(name, 0.0) + value
    for label in labels.values():
        by = sample.labelled.setdefault(name, {})
        by[label] = by.get(label, 0.0) + value


def percentile(buckets: dict[float, float], q: float) -> float | None:
    """The ``q`` quantile of a histogram, linear within a bucket; the last finite bound for what lies above it; None without observations."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    low, below = 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if total > 0 and count >= q * total and count > below:
            return low if bound == float("inf") else low + (bound - low) * (q * total - below) / (count - below)
        low, below = bound, count
    return None


@dataclass(slots=True)
class Span:
    """What happened between two samples."""

    old: Sample
    new: Sample

    def grew(self, name: str) -> float:
        """By how much a counter rose; from nothing, if the server restarted in between."""
        rise = self.new[name] - self.old[name]
        return rise if rise >= 0 else self.new[name]

    def rate(self, name: str) -> float:
        """Per second."""
        return self.grew(name) / max(self.new.at - self.old.at, 1e-9)

    def share(self, part: str, whole: str) -> float | None:
        """Growth of one counter over that of another."""
        return self.grew(part) / self.grew(whole) if self.grew(whole) else None

    def by(self, name: str) -> dict[str, float]:
        """Growth by label."""
        old = self.old.labelled.get(name, {})
        return {k: v - old.get(k, 0.0) for k, v in self.new.labelled.get(name, {}).items()}

    def histogram(self, name: str) -> dict[float, float]:
        """What was observed in between; everything since the server's start, if that was nothing."""
        new, old = self.new.buckets.get(name, {}), self.old.buckets.get(name, {})
        fresh = {bound: count - old.get(bound, 0.0) for bound, count in new.items()}
        return fresh if any(v > 0 for v in fresh.values()) and min(fresh.values()) >= 0 else new


def fetch(url: str, api_key: str = "") -> Sample:
    """A sample of the server at ``url``. Raises OSError if it does not answer."""
    return read(get(url, "/metrics", api_key), time.monotonic())


def get(url: str, path: str, api_key: str = "", timeout: float = 10.0) -> str:
    """The page at a path of the server at ``url`` (with or without /v1).

    Raises OSError if it does not answer in time or not with success, ConfigError for what is no address.
    """
    base = url.rstrip("/").removesuffix("/v1")
    try:
        ask = Request(base + path, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    except ValueError:
        raise ConfigError(f"{url!r} is no address of a server", param="url") from None
    with urlopen(ask, timeout=timeout) as reply:
        return str(reply.read().decode(errors="replace"))


@app.command
def top(*, url: str = "http://127.0.0.1:8000", interval: float = 1.0, once: bool = False, api_key: str = "") -> int:
    """Watch a running server: requests, KV cache, tokens per second, acceptance of drafts, latencies. Ctrl-C ends.

    Parameters
    ----------
    url:
        The server's address.
    interval:
        Seconds between two readings.
    once:
        Print one frame and end.
    api_key:
        Key to send.
    """
    try:
        if interval <= 0:
            raise ConfigError(f"interval must be above 0 seconds, got {interval}", param="interval")
        first = fetch(url, api_key)
        return _once(url, first, interval, api_key) if once or not sys.stdout.isatty() else _watch(url, first, interval, api_key)
    except KeyboardInterrupt:
        return 0
    except URLError as error:
        print(f"presage: no metrics at {url}: {error.reason}; start a server with: presage serve", file=sys.stderr)
    except OSError as error:
        print(f"presage: no metrics at {url}: {error}", file=sys.stderr)
    return 1


def _once(url: str, first: Sample, interval: float, api_key: str) -> int:
    from rich.console import Console

    time.sleep(interval)
    Console(highlight=False).print(frame(url, Span(first, fetch(url, api_key)), [], ""))
    return 0


def _watch(url: str, first: Sample, interval: float, api_key: str) -> int:
    from rich.live import Live

    kept, rates, away = deque([first]), deque[float](maxlen=60), ""
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                new = fetch(url, api_key)
                rates.append(Span(kept[-1], new).rate(RATES["generated"]))
                kept.append(new)
                away = ""
            except OSError as error:
                away = f"the server does not answer ({getattr(error, 'reason', error)}); these are its last figures"
            while len(kept) > 2 and kept[-1].at - kept[0].at > WINDOW:
                kept.popleft()
            live.update(frame(url, Span(kept[0], kept[-1]), list(rates), away), refresh=True)


# ---- one frame


def frame(url: str, span: Span, rates: list[float], away: str) -> Group:
    """What is shown. ``rates``: generated tokens per second lately; ``away``: why the figures are old."""
    from rich.console import Group
    from rich.text import Text

    head = Text(f"presage top  {url}  {span.new.model}", style="bold")
    parts: list[Any] = [head, Text(away, style="bold red")] if away else [head]
    parts += [_load(span, rates), _latencies(span)]
    if span.new["spec_decode_num_drafts_total"]:
        parts.append(_drafts(span))
    return Group(*parts)


def _rows(lines: Iterator[tuple[str, str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", min_width=10)
    for row in lines:
        table.add_row(*row)
    return table


def _load(span: Span, rates: list[float]) -> Table:
    new = span.new

    def lines() -> Iterator[tuple[str, str]]:
        yield "requests", f"{new['num_requests_running']:.0f} running, {new['num_requests_waiting']:.0f} waiting"
        yield "KV cache", f"{_bar(new['kv_cache_usage_perc'])} {new['kv_cache_usage_perc']:.0%}"
        spark = _spark(rates)
        yield "tokens/s", f"{span.rate(RATES['generated']):.1f} generated, {span.rate(RATES['prompt']):.1f} prompt  {spark}"
        yield "steps/s", f"{span.rate(RATES['steps']):.1f}" + _off(span)
        hits = span.share("prefix_cache_hits_total", "prefix_cache_queries_total")
        yield "prefix", "no look-ups" if hits is None else f"{hits:.0%} of prompt tokens found"
        told = (("preemptions", "num_preemptions_total"), ("failed steps", "step_faults_total"), ("refused plans", "policy_errors_total"))
        yield "since start", ", ".join(f"{new[name]:.0f} {what}" for what, name in told)

    return _rows(lines())


def _off(span: Span) -> str:
    """How far predicted step times are from measured ones."""
    share = span.share("step_predicted_seconds_total", "step_measured_seconds_total")
    return f", predicted time {share:.0%} of measured" if share else ""


def _latencies(span: Span) -> Table:
    from rich.table import Table

    table = Table("", "p50", "p90", "p99", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[0].style, table.columns[0].min_width = "dim", 10
    for word, name in LATENCIES.items():
        buckets = span.histogram(name)
        table.add_row(word, *(_time(percentile(buckets, q)) for q in (0.5, 0.9, 0.99)))
    return table


def _drafts(span: Span) -> Table:
    def lines() -> Iterator[tuple[str, str]]:
        drafted, kept = "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"
        share, each = span.share(kept, drafted), span.share(kept, "spec_decode_num_drafts_total")
        if share is None or each is None:
            yield "drafts", f"none now; {span.new[kept] / max(span.new[drafted], 1):.0%} accepted since start"
            return
        length = span.grew(drafted) / span.grew("spec_decode_num_drafts_total")
        yield "drafts", f"{_bar(share)} {share:.0%} of draft tokens accepted, {length:.1f} drafted and {1 + each:.2f} gained per request and step"
        places = span.by("spec_decode_num_accepted_tokens_per_pos_total")
        counts = [places[p] for p in sorted(places, key=int)]
        yield "by place", _spark(counts[:40]) + f"  (1 to {len(counts)})"
        kept_by, drafted_by = (span.by(f"spec_decode_num_{w}_tokens_by_method_total") for w in ("accepted", "draft"))
        yield "by drafter", ", ".join(f"{m} {kept_by.get(m, 0):.0f} of {n:.0f}" for m, n in drafted_by.items() if n)

    return _rows(lines())


def _bar(share: float, width: int = 24) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def _spark(values: list[float]) -> str:
    peak = max(values, default=0.0)
    return "".join(BARS[round(8 * max(v, 0.0) / peak)] for v in values) if peak > 0 else ""


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
