"""Where papers and data sets lie. Recipes belong to the source checkout, not to the wheel: they are documents that run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from presage.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from presage.reproduce.recipe import Recipe

CHECKOUT = Path(__file__).resolve().parents[3]


def papers_folder(explicit: Path | None = None) -> Path:
    """The folder of papers: as told, $PRESAGE_PAPERS, the checkout's, or ./papers. Raises CheckpointError if there is none."""
    told = explicit or (Path(os.environ["PRESAGE_PAPERS"]) if os.environ.get("PRESAGE_PAPERS") else None)
    tried = [told] if told else [CHECKOUT / "papers", Path("papers").resolve()]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"no papers at {' or '.join(map(str, tried))}: recipes are part of the source checkout, not of the installed package; "
        "run this in a clone of the repository, or name the folder with --papers"
    )


def paper_names(folder: Path) -> list[str]:
    """Slugs of the papers in a folder that have a recipe."""
    return sorted(p.parent.name for p in folder.glob("*/recipe.py"))


def load_recipe(folder: Path, name: str) -> Recipe:
    """The ``RECIPE`` of a paper. Raises ConfigError for an unknown name or a file without one."""
    from presage.reproduce.recipe import Recipe

    known = paper_names(folder)
    if name not in known:
        raise ConfigError(f"unknown paper {name!r}; known: {', '.join(known) or 'none'}", param="name")
    path = folder / name / "recipe.py"
    spec = importlib.util.spec_from_file_location(f"presage_paper_{name.replace('-', '_')}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported", param="name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path} defines no RECIPE", param="name")
    return recipe


def data_path(relative: str, explicit: Path | None = None) -> Path:
    """A file of the data sets below --data, $PRESAGE_DATA, or shared/data beside the checkout. Raises CheckpointError naming it if missing."""
    told = explicit or (Path(os.environ["PRESAGE_DATA"]) if os.environ.get("PRESAGE_DATA") else None)
    roots = [told] if told else [CHECKOUT.parent / "shared" / "data", CHECKOUT / "shared" / "data"]
    for root in roots:
        if (root / relative).exists():
            return root / relative
    where = " or ".join(str(r) for r in roots)
    raise CheckpointError(f"the data set {relative} is not in {where}; name the folder with --data or PRESAGE_DATA")


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it; the version outside a checkout."""
    from presage import __version__

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "src") else "")
    except (OSError, subprocess.SubprocessError):
        return f"version {__version__}"
