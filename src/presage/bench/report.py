"""The printed report, with the labels of ``vllm bench serve``: scripts that read those read these."""

from __future__ import annotations

from collections.abc import Sequence

from presage.bench.measures import METRICS, Summary, mean, percentile

WIDTH = 50


def line(label: str, value: float | int) -> str:
    """A label and its number, in two columns."""
    return f"{label:<40} {value:<10.2f}".rstrip() if isinstance(value, float) else f"{label:<40} {value:<10}".rstrip()


def latency_lines(name: str, values: Sequence[float], percentiles: Sequence[float]) -> list[str]:
    """Heading and mean, median and percentiles in milliseconds."""
    short = name.upper()
    rows = [("Mean", mean(values)), ("Median", percentile(values, 50)), *((f"P{p:g}", percentile(values, p)) for p in percentiles)]
    return [f"{METRICS[name]:-^{WIDTH}}"] + [line(f"{word} {short} (ms):", 1e3 * value) for word, value in rows]


def serving_report(summary: Summary, percentiles: Sequence[float] = (99,), title: str = " Serving Benchmark Result ") -> str:
    """The whole report."""
    rates = summary.rates()
    rows = [
        f"{title:=^{WIDTH}}",
        line("Successful requests:", summary.completed),
        line("Failed requests:", summary.failed),
        line("Benchmark duration (s):", summary.duration),
        line("Total input tokens:", summary.n_in),
        line("Total generated tokens:", summary.n_out),
        line("Request throughput (req/s):", rates["request_throughput"]),
    ]
    if "request_goodput" in rates:
        rows.append(line("Request goodput (req/s):", rates["request_goodput"]))
    rows += [
        line("Output token throughput (tok/s):", rates["output_throughput"]),
        line("Total Token throughput (tok/s):", rates["total_token_throughput"]),
    ]
    for name, values in summary.samples.items():
        rows += latency_lines(name, values, percentiles)
    rows += [f"{'Validity':-^{WIDTH}}", *validity(summary, percentiles)]
    return "\n".join([*rows, "=" * WIDTH])


def validity(summary: Summary, percentiles: Sequence[float]) -> list[str]:
    """Whether the numbers can be trusted, in words."""
    rows = [line("P99 send delay (ms):", 1e3 * summary.send_delay_p99)]
    if not summary.valid:
        rows.append("INVALID: the client sent late; use fewer requests a second, or give it a core of its own")
    count = summary.completed + summary.failed
    if count < 100 and any(p >= 99 for p in percentiles):
        rows.append(f"note: P99 of {count} requests is close to their maximum")
    if summary.failed:
        rows.append("note: failed requests count as infinitely slow in percentiles")
    return rows
