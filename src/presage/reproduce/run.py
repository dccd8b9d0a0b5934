"""Run recipes one after another: print each as it ends, write its figure and page, and let no paper's failure cost the others' results."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from presage.core.errors import PresageError
from presage.reproduce import page
from presage.reproduce.figure import draw
from presage.reproduce.find import load_recipe, paper_names
from presage.reproduce.recipe import Job, Measured, Recipe


@dataclass(frozen=True)
class Outcome:
    """A paper that ran: its rows (see ``page.HEAD``) and where its page and figure were written, None if they were not."""

    name: str
    recipe: Recipe
    measured: Measured
    rows: list[tuple[str, ...]]
    seconds: float
    written: Path | None


def reproduce(folder: Path, name: str, job: Job, output: Path | None = None) -> Outcome:
    """Run one paper. Full runs write to its own folder, or to ``output``/name; quick ones only to ``output``: theirs are no figures to keep."""
    recipe = load_recipe(folder, name)
    begin = time.perf_counter()
    measured = recipe.run(job)
    seconds = time.perf_counter() - begin
    rows = page.rows(recipe, measured)
    where = output / name if output is not None else None if job.quick else folder / name
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
        if measured.panels:
            draw(measured.panels, where / page.FIGURE)
        command = f"presage reproduce {name}" + (" --quick" if job.quick else "")
        page.update(where / "README.md", recipe, page.section(recipe, measured, command, seconds, bool(measured.panels)))
    return Outcome(name, recipe, measured, rows, seconds, where)


def run_all(folder: Path, names: list[str], job: Job, output: Path | None = None) -> int:
    """Run papers in order (all of the folder if none is named) and print them. Returns 0, 1 if one failed, 130 if Ctrl-C ended it early."""
    names, failed = names or paper_names(folder), 0
    for i, name in enumerate(names):
        try:
            show(reproduce(folder, name, job, output))
        except KeyboardInterrupt:
            print(f"stopped in {name}; {i} of {len(names)} papers are done and kept", file=sys.stderr)
            return 130
        except Exception as error:
            # One paper alone fails like any command; among several the others still run.
            if len(names) == 1:
                raise
            failed += 1
            if not isinstance(error, PresageError):
                traceback.print_exc()
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed > 0)


def show(outcome: Outcome) -> None:
    """The paper in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(120, Console().width))
    table = Table(title=f"{outcome.recipe.title} ({outcome.recipe.tier}, {outcome.seconds:.0f} s)", title_justify="left", show_lines=True)
    for name in page.HEAD:
        table.add_column(name, overflow="fold")
    for row in outcome.rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"where it stops paying: {outcome.measured.stops}", markup=False)
    for note in outcome.measured.notes:
        console.print(f"- {note}", markup=False)
    if outcome.written is not None:
        console.print(f"written: {outcome.written}", markup=False)
