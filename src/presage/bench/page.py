"""The report as one HTML page: tables and charts inline, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.attainment import attainment, over_scales
from presage.bench.fairness import by_tenant
from presage.bench.measures import METRICS, Record, Summary, mean, percentile, summarise
from presage.bench.svg import Axis, Curve, chart
from presage.bench.window import Series, in_flight

STYLE = """
:root{color-scheme:light dark;--fg:#1a1a1a;--bg:#fff;--grid:#ddd;
--c0:#0b62a4;--c1:#d1495b;--c2:#2a8a4a;--c3:#b07b00;--c4:#6b4fa0;--c5:#008b95;--c6:#a03d7f;--c7:#666}
@media(prefers-color-scheme:dark){:root{--fg:#e6e6e6;--bg:#151515;--grid:#333;
--c0:#5aa9e6;--c1:#ff7b8a;--c2:#5fd08a;--c3:#e6b84c;--c4:#a98ee6;--c5:#4dd0da;--c6:#e68ac8;--c7:#aaa}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--fg);background:var(--bg);margin:2rem auto;max-width:1000px;padding:0 1rem}
svg{width:100%;max-width:480px;font:11px system-ui,sans-serif;fill:var(--fg)}.t{font-weight:600;font-size:12px}
.g{stroke:var(--grid);fill:none}.l{fill:none;stroke-width:1.8}.m{stroke:none}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--grid)}
td:first-child,th:first-child{text-align:left}.bad{color:var(--c1);font-weight:600}.charts{display:flex;flex-wrap:wrap;gap:.5rem}
details{margin:.5rem 0}pre{overflow-x:auto;font-size:12px}
""" + "".join(f".l.c{i}{{stroke:var(--c{i})}}.m.c{i}{{fill:var(--c{i})}}" for i in range(8))


@dataclass(frozen=True)
class Shown:
    """One run of a report. ``rate`` offered (requests/s; inf or nan: none). ``about``: facts to list. ``timeline``: columns over time
    beside the requests in flight (KV use, batch tokens, ...), as (seconds, values)."""

    name: str
    records: Sequence[Record]
    rate: float = math.nan
    about: Mapping[str, Any] = field(default_factory=dict)
    timeline: Mapping[str, Series] = field(default_factory=dict)
    joules: float | None = None


def cdf(values: Sequence[float] | np.ndarray, name: str, scale: float = 1e3) -> Curve:
    """Share of the values that are at most x; what is infinite never comes, so the curve ends below 1."""
    x = np.sort(np.asarray(values, float))
    share = np.arange(1, len(x) + 1) / max(1, len(x))
    return Curve(name, scale * x, share)


def _distributions(runs: Sequence[Shown], sums: Sequence[Summary]) -> list[str]:
    # Beyond a few rates the curves hide each other: the lowest, the highest and some between are shown.
    some = sorted({*np.linspace(0, len(runs) - 1, 6).round().astype(int).tolist()}) if runs else []
    out = []
    for metric, label in METRICS.items():
        curves = [cdf(sums[i].samples[metric], runs[i].name) for i in some if sums[i].samples[metric]]
        if curves:
            what = "share of requests" if metric != "itl" else "share of gaps"
            out.append(chart(label, Axis(f"{metric.upper()} (ms)", log=True), Axis(what, high=1.0), curves))
    return out


def _against_rate(runs: Sequence[Shown], sums: Sequence[Summary], goals: dict[str, float]) -> list[str]:
    known = sorted((i for i, r in enumerate(runs) if math.isfinite(r.rate)), key=lambda i: runs[i].rate)
    if len(known) < 2:
        return []
    rate, x = np.array([runs[i].rate for i in known]), Axis("offered rate (requests/s)")

    def curve(name: str, values: Sequence[float]) -> Curve:
        return Curve(name, rate, np.array(values), marks=True)

    out = []
    for metric in ("ttft", "tpot", "e2el"):
        lines = [curve(f"p{p}", [1e3 * percentile(sums[i].samples[metric], p) for i in known]) for p in (50, 90, 99)]
        out.append(chart(f"{METRICS[metric]} against rate", x, Axis(f"{metric.upper()} (ms)", log=True), lines))
    rates = [sums[i].rates() for i in known]
    goodput = [curve("finished", [r["request_throughput"] for r in rates])]
    if goals:
        goodput.append(curve("within goals", [r["request_goodput"] for r in rates]))
    out.append(chart("Throughput and goodput", x, Axis("requests/s"), goodput))
    if goals:
        shares = [attainment(runs[i].records, goals) for i in known]
        lines = [curve(name, [s[name] for s in shares]) for name in (*goals, "all")]
        out.append(chart("SLO attainment", x, Axis("share of requests", high=1.0), [*lines, Curve("90 %", rate, np.full(len(rate), 0.9))]))
    speed = [1 / max(1e-9, mean(sums[i].samples["tpot"])) for i in known]
    pareto = Curve("", np.array(speed), np.array([r["output_throughput"] for r in rates]), marks=True)
    out.append(chart("All users against one", Axis("tokens/s of one request"), Axis("tokens/s in all"), [pareto]))
    return out


def _goal_scales(runs: Sequence[Shown], goals: dict[str, float]) -> list[str]:
    if not goals:
        return []
    scales = np.geomspace(0.1, 10, 60)
    curves = [Curve(r.name, scales, over_scales(r.records, goals, scales)) for r in runs[:8]]
    return [chart("Attainment over SLO scale", Axis("all goals times", log=True), Axis("share of requests", high=1.0), curves)]


def _timeline(run: Shown) -> list[str]:
    curves = [Curve(name, *series, steps=True) for name, series in in_flight(run.records).items()]
    out = [chart(f"{run.name}: requests in flight", Axis("time (s)"), Axis("requests"), curves)]
    for name, series in run.timeline.items():
        out.append(chart(f"{run.name}: {name}", Axis("time (s)"), Axis(name), [Curve("", *series, steps=True)]))
    return out


def _cells(kind: str, values: Sequence[Any]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(v) if isinstance(v, str) else f'{v:,.4g}'}</{kind}>" for v in values) + "</tr>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"<table>{_cells('th', head)}{''.join(_cells('td', r) for r in rows)}</table>"


def _overview(runs: Sequence[Shown], sums: Sequence[Summary], goals: dict[str, float]) -> str:
    head = ["run", "ok", "failed", "requests/s", "out tokens/s", *(f"{p} {m.upper()} ms" for m in ("ttft", "tpot", "e2el") for p in ("p50", "p99"))]
    head += ["goodput/s", "attainment"] if goals else []
    head += ["J/token"] if any(r.joules for r in runs) else []
    rows = []
    for run, s in zip(runs, sums):
        rates = s.rates()
        row: list[Any] = [run.name, s.completed, s.failed, rates["request_throughput"], rates["output_throughput"]]
        row += [1e3 * percentile(s.samples[m], p) for m in ("ttft", "tpot", "e2el") for p in (50, 99)]
        if goals:
            row += [rates["request_goodput"], attainment(run.records, goals)["all"]]
        if "J/token" in head:
            row.append((run.joules or math.nan) / max(1, s.n_out))
        rows.append(row)
    return _table(head, rows)


def _tenants(runs: Sequence[Shown], goals: dict[str, float]) -> str:
    out = []
    for run in runs:
        found = by_tenant(run.records, goals)
        if len(found) > 1:
            head = ["tenant", *next(iter(found.values()))]
            out.append(f"<h3>{escape(run.name)}</h3>" + _table(head, [[name or "-", *row.values()] for name, row in found.items()]))
    return "<h2>Tenants</h2><p>Seconds.</p>" + "".join(out) if out else ""


def _validity(runs: Sequence[Shown], sums: Sequence[Summary]) -> str:
    bad = [f"{r.name}: p99 of the generator's own delay is {1e3 * s.send_delay_p99:.1f} ms" for r, s in zip(runs, sums) if not s.valid]
    if bad:
        return f'<p class="bad">INVALID: {escape("; ".join(bad))}</p>'
    worst = max((s.send_delay_p99 for s in sums), default=0.0)
    return f"<p>Valid: the generator itself was at most {1e3 * worst:.2f} ms late (p99 of the worst run).</p>"


def html_page(runs: Sequence[Shown], goals: dict[str, float] | None = None, title: str = "Serving benchmark") -> str:
    """The page. Charts against the rate need two runs with a finite one."""
    goals = goals or {}
    runs = sorted(runs, key=lambda r: r.rate if math.isfinite(r.rate) else math.inf)
    sums = [summarise(r.records, goals) for r in runs]
    charts = [*_against_rate(runs, sums, goals), *_distributions(runs, sums), *_goal_scales(runs, goals)]
    times = [c for run in (runs if len(runs) <= 8 else [runs[0], runs[len(runs) // 2], runs[-1]]) for c in _timeline(run)]
    words = ", ".join(f"{name.upper()} ≤ {1e3 * limit:g} ms" for name, limit in goals.items())
    about = "".join(f"<details><summary>{escape(r.name)}</summary><pre>{escape(_facts(r.about))}</pre></details>" for r in runs if r.about)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{_validity(runs, sums)}{f'<p>Goals: {words}.</p>' if words else ''}{_overview(runs, sums, goals)}"
        f'<div class="charts">{"".join(charts)}</div><h2>Over time</h2><div class="charts">{"".join(times)}</div>'
        f"{_tenants(runs, goals)}<h2>Settings</h2>{about}"
        "<p>Latencies count from the scheduled moment of sending; requests that failed count as infinitely slow.</p></body></html>"
    )


def _facts(about: Mapping[str, Any]) -> str:
    long = ("records", "ttfts", "itls", "input_lens", "output_lens", "errors")
    return json.dumps({k: v for k, v in about.items() if k not in long}, indent=1, default=str)


def write_page(path: str | Path, runs: Sequence[Shown], goals: dict[str, float] | None = None, title: str = "Serving benchmark") -> None:
    """``html_page`` into a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(html_page(runs, goals, title), encoding="utf-8")
