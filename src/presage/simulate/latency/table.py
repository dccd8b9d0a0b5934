"""A step's time looked up in measured operator tables: Vidur's profiles (arXiv 2405.05465) and LLMServingSim's.

What depends on rows alone is one piecewise-linear curve per layer, per step and per logit row. Attention is a grid over (chunk, its context,
decoding requests, their mean context) where somebody measured mixed batches, else the roofline's attention on the same device. Between
points interpolation is linear, never in logarithms; beyond the last one the last slope goes on.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numba import njit

from presage.core.errors import ConfigError
from presage.core.plan import Facts
from presage.core.types import Floats
from presage.simulate.latency.hardware import Hardware
from presage.simulate.latency.roofline import Roofline
from presage.simulate.shape import ModelShape

Attention = Callable[[Floats], Floats]
"""Features [m, 12] to seconds [m] of one layer's attention."""
_VIDUR_LAYER = {
    "input_layernorm": 1, "attn_pre_proj": 1, "attn_rope": 1, "attn_post_proj": 1, "post_attention_layernorm": 1, "mlp_up_proj": 1, "mlp_act": 1,
    "mlp_down_proj": 1, "add": 2,
}  # fmt: skip
_LSS_LAYER = ("layernorm", "qkv_proj", "rotary_emb", "o_proj", "layernorm", "gate_up_proj", "act_fn", "down_proj")
_LSS_STEP = ("embedding", "final_layernorm")


@dataclass(frozen=True)
class Curve:
    """Seconds ``y`` at ``x``, linear between and, beyond the last point, with the slope of the last quarter."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """From (x, seconds) in any order; equal x are averaged."""
        found: dict[float, list[float]] = {}
        for x, y in points:
            found.setdefault(x, []).append(y)
        xs = sorted(found)
        return cls(np.array(xs, float), np.array([np.mean(found[x]) for x in xs]))

    def __call__(self, at: np.ndarray) -> np.ndarray:
        x, y, tail = self.x, self.y, max(1, len(self.x) // 4)
        slope = max(0.0, (y[-1] - y[-1 - tail]) / (x[-1] - x[-1 - tail])) if len(x) > tail else 0.0
        return np.asarray(np.interp(at, x, y) + np.maximum(0.0, at - x[-1]) * slope)

    def __add__(self, other: Curve) -> Curve:
        x = np.union1d(self.x, other.x)
        return Curve(x, self(x) + other(x))


def total(curves: Sequence[Curve]) -> Curve:
    """The sum of curves."""
    out = curves[0]
    for curve in curves[1:]:
        out = out + curve
    return out


class Tables:
    """Implements ``core.protocols.LatencyModel`` from curves. ``overhead``: seconds of a step that no operator accounts for (the host).

    ``reduce``: seconds of one all-reduce over rows, two per layer; ``watts`` of the running devices.
    """

    def __init__(
        self, layers: int, layer: Curve, step: Curve, logits: Curve, attention: Attention, *,
        reduce: Curve | None = None, overhead: float = 0.0, watts: float = 0.0, version: str = "table",
    ) -> None:  # fmt: skip
        self.layers, self.layer, self.step, self.logits, self.attention = layers, layer, step, logits, attention
        if reduce is not None:
            self.layer = layer + reduce + reduce
        self.overhead, self.watts, self.version = overhead, watts, version

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2], seconds rounded to a microsecond."""
        rows, share = features[:, 0], features[:, 8]
        layer = self.layer(rows) + self.attention(features)
        logits = np.where(features[:, 5] > 0, self.logits(features[:, 5]), 0.0)
        seconds = np.round(self.overhead + self.step(rows) + logits + self.layers * share * layer + features[:, 11], 6)
        return np.stack([seconds, seconds * self.watts], axis=1)

    def observe(self, facts: Facts) -> None:
        """Tables do not learn."""


# ---- attention


@njit(cache=True)
def _lookup(f, axes, sizes, grid, out):  # type: ignore[no-untyped-def]
    """Multilinear interpolation of every step in the grid [C, P, N, K]; outside, the edge cells go on."""
    low, part, at = np.empty(4, np.int64), np.empty(4), np.empty(4)
    for i in range(len(f)):
        n, rows = f[i, 3], f[i, 0]
        others = rows - n
        if n >= 1.0 and others >= 1.0:
            # kv_tokens = D + P and row_context = D + n P, where the prompts of a step count as one.
            context = (f[i, 7] - f[i, 6]) / (n - 1.0) if n > 1.0 else f[i, 6] / max(1.0, f[i, 1])
            context = min(context, f[i, 6])
            at[0], at[1], at[2], at[3] = n, max(0.0, context - n), others, max(1.0, (f[i, 6] - context) / others)
        elif n >= 1.0:
            at[0], at[1], at[2], at[3] = n, max(0.0, f[i, 7] / n - n), 0.0, 0.0
        else:
            # Rows of a drafted tree read their context once: they count as that many decoding requests, no more.
            at[0], at[1], at[2], at[3] = 0.0, 0.0, f[i, 1], f[i, 6] / max(1.0, f[i, 1])
        for a in range(4):
            j = 0
            while j < sizes[a] - 2 and axes[a, j + 1] <= at[a]:
                j += 1
            low[a] = j
            part[a] = (at[a] - axes[a, j]) / (axes[a, j + 1] - axes[a, j])
        total = 0.0
        for corner in range(16):
            w = 1.0
            for a in range(4):
                w *= part[a] if corner >> a & 1 else 1.0 - part[a]
            if w != 0.0:
                total += w * grid[low[0] + (corner & 1), low[1] + (corner >> 1 & 1), low[2] + (corner >> 2 & 1), low[3] + (corner >> 3 & 1)]
        out[i] = max(0.0, total)


class AttentionGrid:
    """Attention of mixed batches, measured on a grid (LLMServingSim's ``attention.csv``): microseconds by chunk, context, decodes, context."""

    def __init__(self, points: dict[tuple[int, int, int, int], float]) -> None:
        axes = [sorted({p[a] for p in points}) for a in range(4)]
        kept = [[v for v in axis if v == 0 or v & (v - 1) == 0] for axis in axes]
        self.sizes = np.array([len(axis) for axis in kept])
        self.axes = np.zeros((4, self.sizes.max()))
        for a, axis in enumerate(kept):
            self.axes[a, : len(axis)] = axis
        self.grid = np.full(tuple(self.sizes), np.nan)
        for i, key in enumerate(product(*kept)):
            # Without a chunk its context means nothing, without decoding rows theirs.
            c, p, n, k = key
            known = points.get((c, p if c else 0, n, (k or 16) if n else 0), 0.0 if not c and not n else np.nan)
            self.grid[np.unravel_index(i, self.grid.shape)] = known * 1e-6
        self._fill(kept[2])

    def _fill(self, decodes: list[int]) -> None:
        """What was too large to be measured goes on from the two sizes before it."""
        for j in range(2, len(decodes)):
            here, one, two = self.grid[:, :, j], self.grid[:, :, j - 1], self.grid[:, :, j - 2]
            slope = (one - two) / (decodes[j - 1] - decodes[j - 2])
            hole = np.isnan(here)
            here[hole] = (one + slope * (decodes[j] - decodes[j - 1]))[hole]
        if np.isnan(self.grid).any():
            raise ConfigError(f"the attention table has {int(np.isnan(self.grid).sum())} holes", param="latency")

    def __call__(self, features: Floats) -> Floats:
        out = np.empty(len(features))
        _lookup(features, self.axes, self.sizes, self.grid, out)
        return out


def roofline_attention(model: ModelShape, hardware: Hardware, tp: int = 1) -> Attention:
    """Attention of one layer as the roofline prices it, for tables without any."""
    # Priced a thousandfold: one layer costs microseconds, which the rounding of a step would swallow.
    roof = Roofline(model, replace(hardware, overhead=0.0, launch=0.0), tp, only="attend", times=1000 / model.layers)
    return lambda features: roof.predict(features)[:, 0] / 1000


# ---- readers


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"cannot read the table {path}: {error.strerror}", param="latency") from None


def llmservingsim(folder: str | Path, layers: int, *, overhead: float = 0.0, watts: float = 0.0) -> Tables:
    """Tables of LLMServingSim (``dense.csv``, ``per_sequence.csv``, ``attention.csv``; microseconds) for a model of ``layers`` layers."""
    folder = Path(folder)
    dense: dict[str, list[tuple[float, float]]] = {}
    for r in _read(folder / "dense.csv"):
        dense.setdefault(r["layer"], []).append((float(r["tokens"]), float(r["time_us"]) * 1e-6))
    heads: dict[str, list[tuple[float, float]]] = {}
    for r in _read(folder / "per_sequence.csv"):
        heads.setdefault(r["layer"], []).append((float(r["sequences"]), float(r["time_us"]) * 1e-6))
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    points = {(int(r[names[0]]), int(r[names[1]]), int(r[names[2]]), int(r[names[3]])): float(r["time_us"]) for r in _read(folder / "attention.csv")}
    return Tables(
        layers,
        total([Curve.of(dense[name]) for name in _LSS_LAYER]),
        total([Curve.of(dense[name]) for name in _LSS_STEP]),
        total([Curve.of(points_) for points_ in heads.values()]),
        AttentionGrid(points),
        overhead=overhead,
        watts=watts,
        version=f"table {folder.name} (LLMServingSim)",
    )


def vidur(
    mlp: str | Path, model: ModelShape, hardware: Hardware, *, tp: int = 1, all_reduce: str | Path | None = None, overhead: float = 0.0
) -> Tables:  # fmt: skip
    """Vidur's ``mlp.csv`` (milliseconds) for ``tp`` workers, its ``all_reduce.csv``, and the roofline's attention and head.

    Raises ConfigError if the table is of another model or lacks ``tp`` workers.
    """
    rows = [r for r in _read(Path(mlp)) if int(r["num_tensor_parallel_workers"]) == tp]
    if not rows:
        raise ConfigError(f"{mlp} was not measured with {tp} workers", param="tensor_parallel_size")
    sizes = tuple(int(rows[0][k]) for k in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd"))
    if sizes != (model.heads, model.kv_heads, model.d, model.ff):
        raise ConfigError(f"{mlp} is of a model with sizes {sizes}, not {(model.heads, model.kv_heads, model.d, model.ff)}", param="model")

    def curve(op: str) -> Curve:
        return Curve.of((float(r["num_tokens"]), float(r[f"time_stats.{op}.median"]) * 1e-3) for r in rows)

    reduce = None
    if tp > 1:
        if all_reduce is None:
            raise ConfigError(f"{tp} workers need an all_reduce table", param="all_reduce")
        # All workers in one node: the same table has slower rows of workers spread over nodes.
        sent = [r for r in _read(Path(all_reduce)) if int(r["num_workers"]) == int(r["devices_per_node"]) == tp]
        # Sizes are bytes of a bf16 tensor; Vidur adds 20 us for the launch itself.
        reduce = Curve.of((float(r["size"]) / (2 * model.d), float(r["time_stats.all_reduce.median"]) * 1e-3 + 2e-5) for r in sent)
    peak, memory = hardware.peak("bfloat16") * hardware.compute_eff, hardware.bandwidth * 1e9 * hardware.memory_eff
    head = model.d * model.vocab / tp
    logits = Curve(np.array([1.0, 4096.0]), np.array([head * 2 / memory, max(head * 2 / memory, 4096 * 2 * head / peak)]))
    return Tables(
        model.layers,
        total([curve(op) for op, n in _VIDUR_LAYER.items() for _ in range(n)]),
        curve("emb"),
        logits,
        roofline_attention(model, hardware, tp),
        reduce=reduce,
        overhead=overhead,
        watts=tp * hardware.watts,
        version=f"table {Path(mlp).stem} x {tp} (Vidur; attention and head: roofline of {hardware.name})",
    )
