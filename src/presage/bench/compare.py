"""Saved results side by side: what the second run changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from presage.bench.measures import Record
from presage.bench.page import Shown
from presage.bench.rows import read_rows
from presage.core.errors import ConfigError

RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")


def load_result(path: str | Path) -> dict[str, Any]:
    """A result of ``presage bench serve`` (or of vLLM's). Raises ConfigError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a result: {error}", param="result") from None
    if not isinstance(found, dict) or "completed" not in found:
        raise ConfigError(f"{path} is not a result of bench serve", param="result")
    return found


def records_of(result: dict[str, Any]) -> list[Record]:
    """The records of a result saved with ``--save-detailed``. Raises ConfigError if it has none."""
    if not result.get("records"):
        raise ConfigError("the result has no records: save it with --save-detailed", param="result")
    rows: list[dict[str, Any]] = result["records"]
    made = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    return [Record(**row) for row in made]  # type: ignore[arg-type]


def comparison(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str] = ("A", "B")) -> str:
    """Throughputs and latencies of both, and B over A - 1; a warning where the runs were not the same or not valid."""
    keys = [k for k in (*RATES, *sorted(k for k in a if k.endswith("_ms") and "send_delay" not in k)) if k in a and k in b]
    rows = [f"{'':34}{names[0][-14:]:>14} {names[1][-14:]:>14} {'change':>9}"]
    for key in keys:
        x, y = a[key], b[key]
        change = f"{y / x - 1:+9.1%}" if x and y is not None else f"{'-':>9}"
        rows.append(f"{key:34}{_number(x)} {_number(y)} {change}")
    for name, r in zip(names, (a, b)):
        if r.get("valid") is False:
            rows.append(f"INVALID: the client of {name} sent late")
        if r.get("failed"):
            rows.append(f"note: {name} has {r['failed']} failed requests")
    ours, theirs = a.get("config") or {}, b.get("config") or {}
    quiet = {"result_dir", "result_filename", "label", "report", "save_records", "base_url", "metadata"}
    other = [k for k in ours if k in theirs and ours[k] != theirs[k] and k not in quiet]
    rows += [f"note: {k} differs: {ours[k]} and {theirs[k]}" for k in other]
    return "\n".join(rows)


def _number(v: float | None) -> str:
    return f"{'inf':>14}" if v is None else f"{v:14.3f}"


def shown(path: str | Path) -> Shown:
    """A saved result, or a table of records, as a run of a report. Raises ConfigError."""
    path = Path(path)
    if path.suffix in (".csv", ".parquet"):
        return Shown(path.stem, read_rows(path))
    result = load_result(path)
    return Shown(result.get("label") or path.stem, records_of(result), result.get("offered_rate") or float("nan"), result)
