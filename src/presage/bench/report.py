"""The printed report, with the labels of ``vllm bench serve``: scripts that read those read these."""

from __future__ import annotations

from collections.abc import Sequence

from presage.bench.attainment import attainment
from presage.bench.fairness import fairness
from presage.bench.load import Run
from presage.bench.measures import CLIENT_CPU_LIMIT, METRICS, SEND_DELAY_LIMIT, Summary, mean, percentile
from presage.bench.window import concurrency, saturated

WIDTH = 50


def line(label: str, value: float | int) -> str:
    """A label and its number, in two columns."""
    return f"{label:<40} {value:<10.2f}".rstrip() if isinstance(value, float) else f"{label:<40} {value:<10}".rstrip()


def latency_lines(name: str, values: Sequence[float], percentiles: Sequence[float]) -> list[str]:
    """Heading and mean, median and percentiles in milliseconds."""
    short = name.upper()
    rows = [("Mean", mean(values)), ("Median", percentile(values, 50)), *((f"P{p:g}", percentile(values, p)) for p in percentiles)]
    return [f"{METRICS[name]:-^{WIDTH}}"] + [line(f"{word} {short} (ms):", 1e3 * value) for word, value in rows]


def serving_report(
    summary: Summary,
    percentiles: Sequence[float] = (99,),
    title: str = " Serving Benchmark Result ",
    names: Sequence[str] = tuple(METRICS),
    run: Run | None = None,
    goals: dict[str, float] | None = None,
) -> str:
    """The whole report; with ``run``, also what the client itself did and how many goals were met."""
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
    if run is not None:
        rows += load_lines(run, goals or {})
    for name in names:
        rows += latency_lines(name, summary.samples[name], percentiles)
    rows += [f"{'Validity':-^{WIDTH}}", *validity(summary, percentiles, run)]
    return "\n".join([*rows, "=" * WIDTH])


def load_lines(run: Run, goals: dict[str, float]) -> list[str]:
    """Concurrency, shares of requests that met the goals, evenness over tenants if there are several."""
    at = concurrency(run.records)
    rows = [line("Peak concurrent requests:", int(at["peak"])), line("Mean concurrent requests:", at["mean"])]
    if goals:
        rows += [line(f"SLO attainment, {name} (%):", 100 * share) for name, share in attainment(run.records, goals).items()]
    if len({r.tenant for r in run.records}) > 1:
        rows.append(line("Jain fairness of speed over tenants:", fairness(run.records)["jain_speed"]))
    return rows


def validity(summary: Summary, percentiles: Sequence[float], run: Run | None = None) -> list[str]:
    """Whether the numbers can be trusted, in words: first the generator's own error in arrival times."""
    rows = [line("P99 send delay (ms):", 1e3 * summary.send_delay_p99)]
    if run is not None:
        rows.append(line("Client CPU (% of a core):", 100 * run.cpu_share))
        rows.append(f"{'Client priority:':<40} {'real-time' if run.realtime else 'normal'}")
    if not summary.valid:
        limit = f"P99 send delay over {1e3 * SEND_DELAY_LIMIT:g} ms"
        rows.append(f"INVALID: the client sent late ({limit}); give it a core of its own, or real-time priority")
    if run is not None and run.cpu_share > CLIENT_CPU_LIMIT:
        rows.append(f"INVALID: the client used over {CLIENT_CPU_LIMIT:.0%} of a core, so it may have read answers late")
    if run is not None and run.interrupted:
        rows.append("note: interrupted; requests that were not sent yet are left out")
    if run is not None and saturated(run.records):
        rows.append("note: saturated: waiting times rose to the end, and would go on rising")
    count = summary.completed + summary.failed
    if count < 100 and any(p >= 99 for p in percentiles):
        rows.append(f"note: P99 of {count} requests is close to their maximum")
    if summary.failed:
        rows.append("note: failed requests count as infinitely slow in percentiles")
    return rows
