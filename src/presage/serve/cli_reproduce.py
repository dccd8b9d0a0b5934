"""``presage reproduce``: run the recipes of papers and print what they claim beside what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from presage.core.errors import ConfigError
from presage.serve.cli import app


@app.command
def reproduce(
    *names: str,
    every: Annotated[bool, Parameter(name="--all", negative="")] = False,
    quick: Annotated[bool, Parameter(negative="")] = False,
    listed: Annotated[bool, Parameter(name="--list", negative="")] = False,
    output: Path | None = None,
    data: Path | None = None,
    papers: Path | None = None,
) -> int:
    """Reproduce papers: claim, baseline, workload, expected, measured, verdict, and the load at which it stops paying.

    Parameters
    ----------
    names:
        Papers by their folder's name; see --list.
    every:
        All papers.
    quick:
        Less of everything, seconds a paper. Pages stay as they are unless --output is given.
    listed:
        Print the papers there are.
    output:
        Folder for pages and figures instead of the papers' own.
    data:
        Folder of the data sets (PRESAGE_DATA; shared/data beside the checkout by default).
    papers:
        Folder of the papers (PRESAGE_PAPERS; the checkout's by default).
    """
    from presage.reproduce.find import load_recipe, paper_names, papers_folder
    from presage.reproduce.recipe import Job
    from presage.reproduce.run import run_all

    folder = papers_folder(papers)
    if listed:
        for name in paper_names(folder):
            recipe = load_recipe(folder, name)
            print(f"{name:24s} {recipe.tier:18s} {len(recipe.claims)} claims  {recipe.title}")
        return 0
    if not names and not every:
        raise ConfigError("name a paper, or --all; --list prints them", param="names")
    job = Job(quick, data, (lambda text: print(f"  {text}", file=sys.stderr, flush=True)))
    return run_all(folder, list(names), job, output)
