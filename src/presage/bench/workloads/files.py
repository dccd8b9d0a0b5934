"""Files of data sets, plain or gzip; what is missing or malformed is a ConfigError that names file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from presage.core.errors import ConfigError

T = TypeVar("T")


def find(folder: str | Path, name: str) -> Path:
    """A file of a data set: ``folder`` is the set's folder, one that holds it, or the file itself. ``.gz`` is looked for too."""
    root = Path(folder)
    if root.is_file():
        return root
    inside = Path(*Path(name).parts[1:])
    for path in (root / name, root / inside, root / inside.name):
        for each_path in (path, path.with_name(f"{path.name}.gz")):
            if each_path.is_file():
                return each_path
    raise ConfigError(f"{root} has no {name}", param="dataset_path")


def text(path: Path) -> str:
    """The whole file. Raises ConfigError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="dataset_path") from None


def rows(path: Path) -> Iterator[Any]:
    """Objects of a JSON-lines file, or of a JSON file that holds one list."""
    content = text(path)
    if content.lstrip().startswith("[") and path.name.removesuffix(".gz").endswith(".json"):
        yield from parsed(path, 1, lambda: json.loads(content))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield parsed(path, number, lambda line=line: json.loads(line))  # type: ignore[misc]


def table(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header that has these columns."""
    reader = csv.DictReader(io.StringIO(text(path)))
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise ConfigError(f"{path} lacks the columns {sorted(missing)}", param="dataset_path")
    yield from reader


def parsed(path: Path, number: int, make: Callable[[], T]) -> T:
    """What ``make`` gives; its complaint becomes one about a line of a file."""
    try:
        return make()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path}, row {number}: {type(error).__name__}: {error}", param="dataset_path") from None


def each(path: Path, source: Iterator[Any], make: Callable[[Any], T]) -> list[T]:
    """``make`` of every row; raises ConfigError with the first that does not fit, or for a file without rows."""
    found = [parsed(path, i, lambda row=row: make(row)) for i, row in enumerate(source, 1)]  # type: ignore[misc]
    if not found:
        raise ConfigError(f"{path} is empty", param="dataset_path")
    return found
