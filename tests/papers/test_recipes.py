"""Every recipe of the repository runs with --quick, measures all its claims, and has a page from a full run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from presage.reproduce.find import CHECKOUT, load_recipe, paper_names
from presage.reproduce.page import BEGIN, END
from presage.reproduce.recipe import Job
from presage.reproduce.run import reproduce
from tests.shared import shared_data

PAPERS = CHECKOUT / "papers"
NAMES = paper_names(PAPERS)


def test_there_are_papers() -> None:
    assert {"suffix-decoding", "specinfer", "smartspec", "lookahead", "bild", "genz", "sarathi-serve"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(name: str, tmp_path: Path) -> None:
    outcome = reproduce(PAPERS, name, Job(quick=True, data_dir=shared_data("")), tmp_path)
    assert len(outcome.rows) == len(outcome.recipe.claims) and outcome.measured.stops
    assert outcome.written is not None and (outcome.written / "README.md").stat().st_size > 500
    assert (outcome.written / "figure.svg").stat().st_size < 80_000


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_short_and_have_a_page(name: str) -> None:
    text = (PAPERS / name / "recipe.py").read_text()
    assert len(text.splitlines()) <= 180
    assert ast.get_docstring(ast.parse(text))
    page = (PAPERS / name / "README.md").read_text()
    assert BEGIN in page and END in page and (PAPERS / name / "figure.svg").stat().st_size < 80_000
    for claim in load_recipe(PAPERS, name).claims:
        assert f"| {claim.name} |" in page
