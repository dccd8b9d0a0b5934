"""Records as a table: a row per request, in CSV or parquet, and back."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from presage.bench.measures import Record
from presage.core.errors import ConfigError

FLOATS = ("t_sched", "t_send", "t_done", "held")
INTS = ("n_in", "n_out", "n_cached", "session", "turn")
WORDS = ("tenant", "error", "finish")
LISTS = {"chunks": float, "counts": int}


def columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The stored fields, and the measures computed from them (nan where there is none), by name."""
    found: dict[str, list[Any]] = {name: [getattr(r, name) for r in records] for name in (*FLOATS, *INTS, *WORDS, *LISTS)}
    for name in ("ttft", "tpot", "e2el", "send_error"):
        found[name] = [math.nan if (v := getattr(r, name)) is None else v for r in records]
    return found


def write_rows(records: Sequence[Record], path: str | Path) -> None:
    """Write .csv (lists as words separated by blanks) or .parquet. Raises ConfigError for another name, or without pyarrow."""
    path, table = Path(path), columns(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow, parquet = _pyarrow()
        parquet.write_table(arrow.table(table), path)
        return
    if path.suffix != ".csv":
        raise ConfigError(f"records are written as .parquet or .csv, got {path.name}", param="save_records")
    for name in LISTS:
        table[name] = [" ".join(map(str, values)) for values in table[name]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values()))
    path.write_text(out.getvalue(), encoding="utf-8")


def read_rows(path: str | Path) -> list[Record]:
    """The records of a file that ``write_rows`` made. Raises ConfigError."""
    path = Path(path)
    if path.suffix == ".parquet":
        _, parquet = _pyarrow()
        return [_record(row) for row in parquet.read_table(path).to_pylist()]
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [_record(_typed(row)) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a table of records: {error}", param="records") from None


def _typed(row: dict[str, str]) -> dict[str, Any]:
    numbers = {**{n: float(row[n]) for n in FLOATS}, **{n: int(row[n]) for n in INTS}}
    return {**numbers, **{n: row[n] for n in WORDS}, **{n: [kind(v) for v in row[n].split()] for n, kind in LISTS.items()}}


def _record(row: dict[str, Any]) -> Record:
    return Record(**{name: row[name] for name in (*FLOATS, *INTS, *WORDS, *LISTS)})


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("parquet needs pyarrow (pip install 'presage[bench]'); .csv needs nothing", param="save_records") from None
    return pyarrow, pyarrow.parquet
