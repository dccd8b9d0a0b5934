"""Panels side by side as one small SVG. The same numbers give the same bytes, so that a figure under version control changes only when they do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from presage.core.errors import ConfigError
from presage.reproduce.recipe import Panel

COLOURS = ("#1b6ca8", "#d1495b", "#3a9d5d", "#e0a030", "#6c4f9c", "#3bb3c3", "#8a5a44", "#555555")


def draw(panels: list[Panel], path: Path) -> None:
    """Write the figure. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"figures need matplotlib ({error})", param="output") from None
    with matplotlib.rc_context({"svg.hashsalt": "presage", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(4.6 * len(panels), 3.5), layout="constrained")
        for i, panel in enumerate(panels):
            _panel(figure.add_subplot(1, len(panels), i + 1), panel)
        figure.savefig(path, format="svg", metadata={"Date": None})
    path.write_text(slim(path.read_text(encoding="utf-8")), encoding="utf-8")


def slim(svg: str) -> str:
    """The same picture in fewer bytes: hundredths of a point are enough, and nobody reads the indentation or the metadata."""
    svg = re.sub(r" <metadata>.*?</metadata>\n", "", svg, flags=re.DOTALL)
    return re.sub(r"\n\s+", "\n", re.sub(r"(\d+\.\d\d)\d+", r"\1", svg))


def _panel(ax: Any, p: Panel) -> None:
    wide = 0.8 / max(1, len(p.lines))
    for i, (label, (x, y)) in enumerate(p.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        if p.kind == "bar":
            at = [j - 0.4 + wide * (i + 0.5) for j in range(len(x))]
            ax.bar(at, y, wide, label=label, color=colour)
            ax.set_xticks(range(len(x)), x)
        elif p.kind == "scatter":
            ax.scatter(x, y, s=10, label=label, color=colour, linewidths=0)
        else:
            ax.plot(x, y, marker="o" if len(x) <= 24 else None, markersize=3, linewidth=1.4, label=label, color=colour)
    _frame(ax, p)


def _frame(ax: Any, p: Panel) -> None:
    if p.level is not None:
        ax.axhline(p.level, color="#888888", linewidth=1, linestyle="--")
    if p.logx:
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
    if p.logy:
        ax.set_yscale("log")
    ax.set(title=p.title, xlabel=p.xlabel, ylabel=p.ylabel)
    if len(p.lines) > 1:
        ax.legend(fontsize=7, framealpha=0.8)
