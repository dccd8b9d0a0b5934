"""Progress of a load on stderr: a bar for people, one line per ten seconds for logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from presage.models.loading.checkpoint import Progress

EVERY_SECONDS = 10.0


@contextmanager
def stderr_progress(title: str = "loading", stream: TextIO | None = None, every: float = EVERY_SECONDS) -> Iterator[Progress]:
    """Context manager giving a ``progress(done, total)`` callable (bytes) that shows a bar on a terminal and sparse lines elsewhere."""
    out = stream if stream is not None else sys.stderr
    if not out.isatty():
        yield _Lines(title, out, every)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(file=out), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints at most one line per ``every`` seconds, and none for a load shorter than that."""

    def __init__(self, title: str, out: TextIO, every: float) -> None:
        self._title, self._out, self._every = title, out, every
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        print(f"{self._title}: {100 * done / max(total, 1):.0f} % of {total / (1 << 20):,.0f} MiB", file=self._out, flush=True)
