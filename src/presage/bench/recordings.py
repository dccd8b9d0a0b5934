"""Recorded prompts and outputs from a file: JSONL or CSV, gzipped or not, as token ids, as text or as conversations."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from presage.core.errors import CheckpointError, ConfigError
from presage.core.types import Ints

Encode = Callable[[str], list[int]]


@dataclass(slots=True, frozen=True)
class Recording:
    """Ids of one request's prompt and of its output."""

    prompt: Ints
    output: Ints


@dataclass(slots=True, frozen=True)
class Columns:
    """Where a row holds what. ``prompt`` and ``output``: columns of ids or of text; "" takes ``prompt_token_ids`` or ``prompt``, and
    ``token_ids`` or ``output``. ``messages``: a column with a conversation instead; each of the assistant's turns is an output, all before
    it the prompt. ``where``: "column=value", rows to take."""

    prompt: str = ""
    output: str = ""
    messages: str = ""
    where: str = ""


def recordings(path: Path, encode: Encode | None = None, limit: int = -1, columns: Columns | None = None) -> Iterator[Recording]:
    """The file's first ``limit`` recordings (-1: all), oldest first. Outputs under 2 ids are left out: nothing of them could be drafted.

    Raises CheckpointError for an unreadable file, ConfigError (naming the line) for rows without the columns.
    """
    found, columns = 0, columns or Columns()
    for number, row in _rows(path):
        try:
            for prompt, output in _pairs(row, columns):
                if found == limit:
                    return
                one = Recording(_ids(prompt, encode), _ids(output, encode))
                if len(one.output) > 1:
                    found += 1
                    yield one
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{path}, line {number}: {error}", param="recordings") from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their line numbers."""
    try:
        blob = path.read_bytes()
        text = (gzip.decompress(blob) if path.suffix == ".gz" else blob).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if path.name.removesuffix(".gz").endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, _row(path, number, line)


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: {error}", param="recordings") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{path}, line {number}: a row must be an object", param="recordings")
    return row


def _pairs(row: dict[str, Any], columns: Columns) -> Iterator[tuple[Any, Any]]:
    """Prompts and outputs of a row, ids or text."""
    name, _, value = columns.where.partition("=")
    if name and str(row.get(name)) != value:
        return
    if columns.messages:
        yield from _turns(_column(row, columns.messages))
    else:
        prompt, output = (columns.prompt,) if columns.prompt else ("prompt_token_ids", "prompt"), columns.output
        yield _column(row, *prompt), _column(row, *((output,) if output else ("token_ids", "output")))


def _column(row: dict[str, Any], *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"has no {' or '.join(names)}; it has {', '.join(map(str, row))}")


def _turns(messages: Any) -> Iterator[tuple[str, str]]:
    """The assistant's turns, tool calls as JSON."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise TypeError("a conversation must be a list of messages")
    before = ""
    for m in messages:
        text = str(m.get("content") or "") + (json.dumps(m["tool_calls"]) if m.get("tool_calls") else "")
        if m.get("role") == "assistant":
            yield before, text
        before += f"\n{m.get('role')}: {text}"


def _ids(value: Any, encode: Encode | None) -> Ints:
    if isinstance(value, str):
        if encode is None:
            raise ValueError("holds text, which needs a tokenizer")
        value = encode(value)
    out: Ints = np.array(value, np.int32)
    if out.ndim != 1 or (len(out) and out.min() < 0):
        raise ValueError("ids must be a list of numbers of at least 0")
    return out
