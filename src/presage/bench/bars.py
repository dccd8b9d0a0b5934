"""Stacked bars as one SVG text: parts of a whole, side by side for several cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

COLOURS = (
    "#0b62a4", "#d1495b", "#2a8a4a", "#b07b00", "#6b4fa0", "#008b95", "#a03d7f", "#8a5a44", "#5aa9e6", "#ff7b8a", "#5fd08a", "#e6b84c",
    "#a98ee6", "#4dd0da", "#777777", "#aaaaaa", "#cccccc",
)  # fmt: skip
WIDTH, BAR, GAP, LABEL, TOP = 820, 20, 8, 190, 34


def stacked(title: str, bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """One horizontal bar per case, its parts as shares of their sum, in the order of first use; parts below zero are left out."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    room = WIDTH - LABEL - 10
    legend = TOP + len(bars) * (BAR + GAP) + 10
    height = legend + 18 * -(-len(names) // 6) + 6
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui,sans-serif" font-size="11">']
    out.append(f'<rect width="{WIDTH}" height="{height}" fill="#fff"/><text x="8" y="18" font-size="13" font-weight="600">{escape(title)}</text>')
    for i, (label, parts) in enumerate(bars):
        at, y, total = float(LABEL), TOP + i * (BAR + GAP), sum(max(0.0, v) for v in parts.values()) or 1.0
        out.append(f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        for name, value in parts.items():
            wide = room * max(0.0, value) / total
            text = f"{escape(name)}: {value / total:.1%}"
            out.append(f'<rect x="{at:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}" fill="{colour[name]}"><title>{text}</title></rect>')
            at += wide
    for k, name in enumerate(names):
        x, y = 8 + 134 * (k % 6), legend + 18 * (k // 6)
        out.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour[name]}"/><text x="{x + 17}" y="{y + 10}">{escape(name)}</text>')
    return "".join([*out, "</svg>"])


def write_bars(path: str | Path, title: str, bars: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Write the bars as an SVG file, or as a page if the name ends in .html."""
    text = stacked(title, bars)
    if Path(path).suffix.lower() in (".html", ".htm"):
        text = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><body>{text}</body></html>'
    Path(path).write_text(text + "\n", encoding="utf-8")
