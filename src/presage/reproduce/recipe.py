"""What a recipe declares and what its run returns: plain data, so that printing, drawing and judging are done once for all papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from presage.core.errors import ConfigError
from presage.reproduce.find import data_path

TIERS = {"simulation": "minutes", "tiny cpu": "minutes", "original hardware": "hours"}
"""Where a recipe runs, and about how long."""
VERDICTS = ("shown", "weaker", "not shown", "opposite")


@dataclass(frozen=True)
class Claim:
    """One claim as a number. From ``least`` on it counts as shown; ``neutral`` would mean no effect, beyond it lies the opposite.

    ``least`` below ``neutral`` means that smaller supports the claim. ``paper``: what the authors report; ``expected``: the shape looked for here.
    """

    name: str
    paper: str
    baseline: str
    workload: str
    expected: str
    least: float
    neutral: float = 1.0
    unit: str = "x"


def significant(value: float) -> float:
    """Rounded as it is printed: to three digits, above 100 to whole numbers. Verdicts are about what a reader sees."""
    return round(value) if abs(value) >= 100 else float(f"{value:.3g}")


def verdict(claim: Claim, value: float) -> str:
    """Shown from ``least`` on, weaker between, not shown around ``neutral`` (2 % of it, or a tenth of the way), opposite beyond.

    What is no number shows nothing.
    """
    if not math.isfinite(value):
        return "not shown"
    way = claim.least - claim.neutral
    if not way:
        raise ConfigError(f"claim {claim.name!r}: least and neutral must differ", param="least")
    gone = round(math.copysign(1.0, way) * (significant(value) - claim.neutral), 9)
    noise = max(0.1 * abs(way), 0.02 * abs(claim.neutral))
    if gone >= round(abs(way), 9):
        return "shown"
    if gone > noise:
        return "weaker"
    return "not shown" if gone >= -noise else "opposite"


@dataclass(frozen=True)
class Panel:
    """One diagram: ``lines`` by label, each (x, y). ``kind``: "line", "bar" (x are names) or "scatter"; ``level``: a dashed line."""

    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, tuple[Sequence[float] | Sequence[str], Sequence[float]]]
    kind: str = "line"
    logx: bool = False
    logy: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Grid:
    """A table for the page, cells already as text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Measured:
    """``values`` by claim name; ``stops``: the load at which it stops paying, as a sentence; what else is worth a look."""

    values: dict[str, float]
    stops: str
    panels: list[Panel] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Job:
    """What a run may use. ``quick``: seconds instead of minutes, same code with less of everything. ``say`` shows progress."""

    quick: bool = False
    data_dir: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def data(self, relative: str) -> Path:
        """A file or folder of the data sets. Raises CheckpointError if it is not there, naming where it was looked for."""
        return data_path(relative, self.data_dir)

    def pick(self, full: int, quick: int) -> int:
        """A size for this run."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Recipe:
    """A paper: ``paper`` cites it, ``claims`` say what is looked for, ``run`` measures it. ``tier``: one of ``TIERS``."""

    title: str
    paper: str
    tier: str
    claims: tuple[Claim, ...]
    run: Callable[[Job], Measured]

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ConfigError(f"tier must be one of {', '.join(TIERS)}, not {self.tier!r}", param="tier")
        if not self.claims or len({c.name for c in self.claims}) != len(self.claims):
            raise ConfigError(f"{self.title}: a recipe needs claims of different names", param="claims")
