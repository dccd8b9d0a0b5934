"""The page of a paper: its own words stay, what stands between the markers is what the last full run measured."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from presage.core.errors import ConfigError
from presage.reproduce.find import commit
from presage.reproduce.recipe import Grid, Measured, Recipe, significant, verdict

BEGIN, END = "<!-- measured: written by presage reproduce -->", "<!-- end of measured -->"
FIGURE = "figure.svg"
HEAD = ("claim", "paper reports", "baseline", "workload", "expected", "measured", "verdict")


def machine() -> str:
    """Processor, cores and Python."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, Python {platform.python_version()}"


def shown(value: float, unit: str) -> str:
    """A value with its unit: three digits that mean something."""
    return f"{significant(value):g}" + (unit if unit in ("x", "%") else f" {unit}" if unit else "")


def rows(recipe: Recipe, measured: Measured) -> list[tuple[str, ...]]:
    """A row of ``HEAD`` per claim. Raises ConfigError if a run and its claims do not match."""
    if set(measured.values) != {c.name for c in recipe.claims}:
        raise ConfigError(f"{recipe.title}: the run measured {sorted(measured.values)}, the claims are {[c.name for c in recipe.claims]}")
    found: list[tuple[str, ...]] = []
    for c in recipe.claims:
        value = measured.values[c.name]
        found.append((c.name, c.paper, c.baseline, c.workload, c.expected, shown(value, c.unit), verdict(c, value)))
    return found


def table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def section(recipe: Recipe, measured: Measured, command: str, seconds: float, figure: bool) -> str:
    """What stands between the markers."""
    parts = [
        "## Measured",
        f"{time.strftime('%Y-%m-%d')} · {machine()} · commit {commit()} · tier: {recipe.tier} · {seconds:.0f} s · `{command}`",
        table(HEAD, rows(recipe, measured)),
        f"**Where it stops paying:** {measured.stops}",
    ]
    if figure:
        parts.append(f"![{recipe.title}]({FIGURE})")
    parts += [_grid(grid) for grid in measured.grids]
    if measured.notes:
        parts.append("\n".join(f"- {note}" for note in measured.notes))
    return "\n\n".join(parts)


def _grid(grid: Grid) -> str:
    return f"**{grid.title}**\n\n" + table(tuple(grid.head), [tuple(row) for row in grid.rows])


def update(path: Path, recipe: Recipe, text: str) -> None:
    """Put ``text`` between the markers of a page; a page without them gets them at its end, a missing one is begun with the title."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# {recipe.title}\n\n{recipe.paper}\n"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before.rstrip()}\n\n{BEGIN}\n{text}\n{END}\n{after.lstrip()}", encoding="utf-8")
