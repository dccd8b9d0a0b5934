"""The framework behind ``presage reproduce``: verdicts, pages, what is kept when something fails, and where papers and data are looked for."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from presage.core.errors import CheckpointError, ConfigError
from presage.reproduce import Claim, Job, Measured, Panel, Recipe, verdict
from presage.reproduce.find import data_path, load_recipe, paper_names, papers_folder
from presage.reproduce.page import BEGIN, END, rows, update
from presage.reproduce.run import reproduce, run_all
from presage.serve.cli import main

RECIPE = """
    from presage.core.errors import CheckpointError
    from presage.reproduce import Claim, Job, Measured, Panel, Recipe

    CLAIM = Claim("speed", "2x", "nothing", "nobody's", "1.5x or more", 1.5)

    def run(job: Job) -> Measured:
        {body}
        return Measured({{"speed": {value}}}, "at 8 requests", [Panel("a", "x", "y", {{"line": ([1, 2], [3.0, 4.0])}})], notes=["once"])

    RECIPE = Recipe("A paper", "Somebody, 2024", "simulation", (CLAIM,), run)
"""


def paper(folder: Path, name: str, value: float = 2.0, body: str = "pass") -> Path:
    """A paper's folder with a recipe that measures ``value``."""
    (folder / name).mkdir(parents=True)
    (folder / name / "recipe.py").write_text(textwrap.dedent(RECIPE.format(value=value, body=body)))
    return folder / name


def claim(least: float, neutral: float = 1.0) -> Claim:
    return Claim("c", "", "", "", "", least, neutral)


@pytest.mark.parametrize(
    ("least", "neutral", "value", "expected"),
    [
        (1.5, 1.0, 1.5, "shown"), (1.5, 1.0, 1.4996, "shown"), (1.5, 1.0, 1.49, "weaker"), (1.5, 1.0, 1.04, "not shown"),
        (1.5, 1.0, 0.97, "not shown"),
        (1.5, 1.0, 0.9, "opposite"), (10.0, 40.0, 3.0, "shown"), (10.0, 40.0, 25.0, "weaker"), (10.0, 40.0, 39.0, "not shown"),
        (10.0, 40.0, 60.0, "opposite"), (1.02, 1.0, 0.99, "not shown"), (2.0, 1.0, float("nan"), "not shown"), (2.0, 1.0, float("inf"), "not shown"),
    ],
)  # fmt: skip
def test_verdicts(least: float, neutral: float, value: float, expected: str) -> None:
    assert verdict(claim(least, neutral), value) == expected


def test_a_claim_needs_a_direction() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        verdict(claim(1.0), 1.0)
    with pytest.raises(ConfigError, match="different names"):
        Recipe("t", "p", "simulation", (claim(2.0), claim(3.0)), lambda job: Measured({}, ""))
    with pytest.raises(ConfigError, match="tier"):
        Recipe("t", "p", "cloud", (claim(2.0),), lambda job: Measured({}, ""))


def test_values_must_match_the_claims() -> None:
    recipe = Recipe("t", "p", "simulation", (claim(2.0),), lambda job: Measured({}, ""))
    assert rows(recipe, Measured({"c": 123.4}, ""))[0][-2:] == ("123x", "shown")
    with pytest.raises(ConfigError, match="the run measured"):
        rows(recipe, Measured({"d": 1.0}, ""))


def test_a_run_writes_its_page_and_figure(tmp_path: Path) -> None:
    folder = paper(tmp_path, "one")
    (folder / "README.md").write_text(f"# Mine\n\nMy words.\n\n{BEGIN}\nold figures\n{END}\n\nMore words.\n")
    outcome = reproduce(tmp_path, "one", Job())
    page = (folder / "README.md").read_text()
    assert outcome.rows[0][-1] == "shown" and outcome.written == folder
    assert page.startswith("# Mine\n\nMy words.") and page.rstrip().endswith("More words.") and "old figures" not in page
    for words in ("| speed | 2x | nothing | nobody's | 1.5x or more | 2x | shown |", "at 8 requests", "presage reproduce one", "figure.svg"):
        assert words in page
    first = (folder / "figure.svg").read_bytes()
    reproduce(tmp_path, "one", Job())
    assert (folder / "figure.svg").read_bytes() == first and len(first) < 60_000
    assert (folder / "README.md").read_text().count(BEGIN) == 1


def test_quick_runs_leave_pages_alone(tmp_path: Path) -> None:
    folder = paper(tmp_path / "papers", "one")
    assert reproduce(tmp_path / "papers", "one", Job(quick=True)).written is None
    assert [p.name for p in folder.iterdir() if p.is_file()] == ["recipe.py"]
    reproduce(tmp_path / "papers", "one", Job(quick=True), tmp_path / "out")
    assert "--quick" in (tmp_path / "out" / "one" / "README.md").read_text()
    assert not (folder / "README.md").exists()


def test_the_opposite_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper(tmp_path, "one", 0.5)
    assert run_all(tmp_path, ["one"], Job(quick=True)) == 0
    assert "opposite" in capsys.readouterr().out


def test_one_failure_costs_no_other_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper(tmp_path, "a")
    paper(tmp_path, "b", body="raise CheckpointError('the data set x is not there')")
    paper(tmp_path, "c", body="1 / 0")
    paper(tmp_path, "d")
    assert run_all(tmp_path, [], Job()) == 1
    said = capsys.readouterr()
    assert "the data set x is not there" in said.err and "ZeroDivisionError" in said.err
    assert [(tmp_path / n / "README.md").exists() for n in "abcd"] == [True, False, False, True]
    with pytest.raises(CheckpointError):
        run_all(tmp_path, ["b"], Job())


def test_ctrl_c_keeps_finished_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper(tmp_path, "a")
    paper(tmp_path, "b", body="raise KeyboardInterrupt")
    paper(tmp_path, "c")
    assert run_all(tmp_path, [], Job()) == 130
    assert "1 of 3" in capsys.readouterr().err
    assert [(tmp_path / n / "README.md").exists() for n in "abc"] == [True, False, False]


def test_papers_and_data_are_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper(tmp_path, "one")
    (tmp_path / "loose").mkdir()
    assert paper_names(tmp_path) == ["one"]
    monkeypatch.setenv("PRESAGE_PAPERS", str(tmp_path))
    assert papers_folder() == tmp_path
    with pytest.raises(CheckpointError, match="no papers at"):
        papers_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="unknown paper 'two'; known: one"):
        load_recipe(tmp_path, "two")
    (tmp_path / "loose" / "recipe.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no RECIPE"):
        load_recipe(tmp_path, "loose")
    monkeypatch.setenv("PRESAGE_DATA", str(tmp_path))
    assert data_path("one/recipe.py").is_file()
    with pytest.raises(CheckpointError, match=r"no/such\.csv is not in .*--data"):
        data_path("no/such.csv")


def test_pages_without_markers_get_them_at_the_end(tmp_path: Path) -> None:
    recipe = Recipe("Title", "Cited", "simulation", (claim(2.0),), lambda job: Measured({}, ""))
    update(tmp_path / "new.md", recipe, "body")
    assert (tmp_path / "new.md").read_text() == f"# Title\n\nCited\n\n{BEGIN}\nbody\n{END}\n"
    (tmp_path / "old.md").write_text("Only words.\n")
    update(tmp_path / "old.md", recipe, "body")
    assert (tmp_path / "old.md").read_text().startswith(f"Only words.\n\n{BEGIN}\nbody")


def test_every_kind_of_panel_is_drawn(tmp_path: Path) -> None:
    from presage.reproduce.figure import draw

    line = {"a": ([1, 2, 4], [1.0, 2.0, 3.0]), "b": ([1, 2, 4], [3.0, 2.0, 1.0])}
    panels = [Panel("l", "x", "y", line, logx=True, logy=True, level=2.0), Panel("s", "x", "y", line, kind="scatter"),
              Panel("b", "x", "y", {"a": (["p", "q"], [1.0, 2.0]), "b": (["p", "q"], [2.0, 1.0])}, kind="bar")]  # fmt: skip
    draw(panels, tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    assert text.rstrip().endswith("</svg>") and all(f">{w}<" in text for w in ("p", "q", "a", "b"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper(tmp_path, "one")
    for words, status in ((["--list"], 0), (["one", "--quick"], 0), ([], 1), (["two"], 1)):
        with pytest.raises(SystemExit) as end:
            main(["reproduce", *words, "--papers", str(tmp_path)])
        assert (end.value.code or 0) == status
    said = capsys.readouterr()
    assert "A paper" in said.out and "shown" in said.out and "name a paper" in said.err and "unknown paper" in said.err
