"""Line charts as SVG text: axes with round ticks, a legend, nothing fetched from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 280, 56, 12, 28, 42
POINTS = 240
"""Points of a curve at most: more cannot be seen, and a page has many curves."""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one line; ``steps``: the value holds until the next point. Points that are not finite are left out."""

    name: str
    x: np.ndarray
    y: np.ndarray
    steps: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Axis:
    """``log``: decades instead of equal steps. ``low``, ``high``: fixed ends instead of the data's."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, log: bool = False, n: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        # Decades where there are enough of them, else 1, 2, 5.
        for parts in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [m * 10.0**p for p in powers for m in parts if low <= m * 10.0**p <= high]
            if len(found) > 2:
                return found
        return [low, high]
    rough = (high - low) / n
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ends(axis: Axis, values: np.ndarray) -> tuple[float, float]:
    if axis.log:
        values = values[values > 0]
    low = axis.low if axis.low is not None else float(values.min()) if axis.log and len(values) else 0.0
    high = axis.high if axis.high is not None else float(values.max()) if len(values) else 1.0
    if axis.log:
        return (low, high) if high > 1.05 * low > 0 else (max(low, 1e-9) / 2, max(high, 1e-9) * 2)
    # A little room above the highest point; an end that was asked for is kept.
    room = 0.05 * (high - low) if axis.high is None else 0.0
    return (low, high + room) if high > low else (low, low + 1.0)


def _thin(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) <= POINTS:
        return x, y
    if not curve.steps:
        at = np.linspace(0, len(x) - 1, POINTS).astype(int)
        return x[at], y[at]
    # Of a timeline the peaks matter: each stretch shows its largest value.
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)[:-1]
    return x[edges], np.maximum.reduceat(y, edges)


class _Plane:
    """From values to places on the page."""

    def __init__(self, x: Axis, y: Axis, points: Sequence[tuple[np.ndarray, np.ndarray]], top: int = TOP) -> None:
        self.x, self.y, self.top = x, y, top
        self.x0, self.x1 = _ends(x, np.concatenate([p[0] for p in points] or [np.empty(0)]))
        self.y0, self.y1 = _ends(y, np.concatenate([p[1] for p in points] or [np.empty(0)]))

    @staticmethod
    def _share(v: np.ndarray, low: float, high: float, log: bool) -> np.ndarray:
        if log:
            v, low, high = np.log(np.maximum(v, low)), math.log(low), math.log(high)
        return np.asarray(np.clip((v - low) / (high - low), 0, 1))

    def px(self, v: np.ndarray) -> np.ndarray:
        """Across."""
        return np.asarray(LEFT + (WIDTH - LEFT - RIGHT) * self._share(v, self.x0, self.x1, self.x.log))

    def py(self, v: np.ndarray) -> np.ndarray:
        """Down."""
        return np.asarray(HEIGHT - BOTTOM - (HEIGHT - self.top - BOTTOM) * self._share(v, self.y0, self.y1, self.y.log))


def _axes(plane: _Plane, title: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = [f'<text class="t" x="{LEFT}" y="16">{escape(title)}</text>']
    for v in ticks(plane.x0, plane.x1, plane.x.log):
        at = float(plane.px(np.array(v)))
        out.append(f'<path class="g" d="M{at:.1f} {plane.top}V{bottom}"/><text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{v:.4g}</text>')
    for v in ticks(plane.y0, plane.y1, plane.y.log):
        at = float(plane.py(np.array(v)))
        out.append(f'<path class="g" d="M{LEFT} {at:.1f}H{right}"/><text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{v:.4g}</text>')
    middle = (LEFT + right) // 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(plane.x.label)}</text>')
    out.append(f'<text transform="translate(12 {(plane.top + bottom) // 2}) rotate(-90)" text-anchor="middle">{escape(plane.y.label)}</text>')
    return out


def chart(title: str, x: Axis, y: Axis, curves: Sequence[Curve]) -> str:
    """One chart as an ``<svg>`` element; colours are classes c0, c1, ... of the page."""
    points = [_thin(c) for c in curves]
    named = [(i, c.name) for i, c in enumerate(curves) if c.name]
    plane = _Plane(x, y, points, TOP + 14 * -(-len(named) // 3))
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', *_axes(plane, title)]
    for i, (curve, (px, py)) in enumerate(zip(curves, points)):
        at = list(zip(plane.px(px).round(1).tolist(), plane.py(py).round(1).tolist()))
        if not at:
            continue
        path = f"M{at[0][0]} {at[0][1]}" + "".join(f"H{a}V{b}" if curve.steps else f"L{a} {b}" for a, b in at[1:])
        out.append(f'<path class="l c{i % 8}" d="{path}"/>')
        if curve.marks:
            out += [f'<circle class="m c{i % 8}" cx="{a}" cy="{b}" r="3"/>' for a, b in at]
    for k, (i, name) in enumerate(named):
        at_x, at_y = LEFT + 132 * (k % 3), TOP + 4 + 14 * (k // 3)
        out.append(f'<path class="l c{i % 8}" d="M{at_x} {at_y - 4}h14"/><text x="{at_x + 18}" y="{at_y}">{escape(name)}</text>')
    return "".join([*out, "</svg>"])
