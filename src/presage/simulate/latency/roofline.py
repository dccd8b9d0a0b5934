"""A step as a sum of operators, each as slow as its slowest resource: GenZ's model (arXiv 2406.01698) on the engine's twelve features.

An operator is a row of data: operations, bytes and collective bytes, each linear in eight sizes of the step. So prefill, decode, mixed
chunks, verification of drafts, mixtures of experts and tensor parallelism are one formula, and an explanation is the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from presage.core.errors import ConfigError
from presage.core.plan import Facts
from presage.core.types import Floats
from presage.simulate.latency.hardware import Hardware
from presage.simulate.shape import ModelShape

SIZES = ("one", "rows", "logit_rows", "pairs", "kv_tokens", "pairs_window", "kv_window", "experts")
"""What operators are linear in: 1, rows, rows with logits, query-key pairs and keys read (full and windowed layers), experts touched."""
_ONE, _ROWS, _LOGITS, _PAIRS, _KV, _PAIRS_W, _KV_W, _EXPERTS = range(8)


@dataclass(frozen=True)
class Operator:
    """``count`` equal operators. ``flops``, ``bytes``, ``wire`` [8]: coefficients over ``SIZES``; ``wire`` 0 = no collective.

    ``peak`` 0 = matrix units at the weights' format, 1 = at the cache's. ``whole``: runs once per step whatever the layer range.
    """

    name: str
    count: int
    flops: np.ndarray
    bytes: np.ndarray
    wire: np.ndarray
    whole: bool = False
    kind: str = ""


def _row(**sizes: float) -> np.ndarray:
    out = np.zeros(len(SIZES))
    for name, value in sizes.items():
        out[SIZES.index(name)] = value
    return out


def _gemm(
    name: str, count: int, numbers: float, ins: float, outs: float, weight: float, act: float, rows: str = "rows", whole: bool = False
) -> Operator:  # fmt: skip
    """A product with ``numbers`` weights: they are read once, ``ins`` + ``outs`` activations per row move."""
    return Operator(
        name, count, _row(**{rows: 2 * numbers}), _row(**{"one": numbers * weight, rows: (ins + outs) * act}), _row(), whole, "gemm"
    )  # fmt: skip


def operators(m: ModelShape, tp: int = 1, act: float = 2.0) -> list[Operator]:
    """The operators of one step of a model split over ``tp`` devices, as one of them sees it."""
    w, d = m.weight_bytes, m.d
    ops = [Operator("embed", 1, _row(), _row(rows=2 * d * act), _row(), True)]
    ops.append(_gemm("attn_in", m.layers, m.attention_in / tp, d, m.attention_in / d / tp, w, act))
    ops += _attention(m, tp, act)
    ops.append(_gemm("attn_out", m.layers, m.attention_out / tp, m.attention_out / d / tp, d, w, act))
    ops.append(Operator("norms", 2 * m.layers, _row(rows=5 * d), _row(rows=4 * d * act), _row()))
    sparse = m.layers - m.dense_layers if m.experts else 0
    if m.layers - sparse:
        ops += _mlp("mlp", m.layers - sparse, m, m.ff / tp, act)
    if sparse:
        ops += _moe(m, sparse, tp, act)
    if tp > 1:
        ops.append(Operator("all_reduce", 2 * m.layers, _row(), _row(), _row(rows=d * act)))
    ops.append(_gemm("lm_head", 1, d * m.vocab / tp, d, m.vocab / tp, w, act, "logit_rows", True))
    return ops


def _attention(m: ModelShape, tp: int, act: float) -> list[Operator]:
    """Scores and values; K and V are read once per KV head (replicated when there are fewer heads than devices)."""
    heads, kv = m.heads / tp, m.kv_dim * max(1 / tp, 1 / m.kv_heads) * m.kv_bytes
    out = []
    for count, pairs, keys in ((m.layers - m.windowed, "pairs", "kv_tokens"), (m.windowed, "pairs_window", "kv_window")):
        if count:
            flops = _row(**{pairs: 2 * heads * (m.score_dim + m.value_dim)})
            read = _row(**{keys: kv, "rows": heads * (m.score_dim + m.value_dim) * act + kv})
            out.append(Operator("attend" if pairs == "pairs" else "attend_window", count, flops, read, _row(), kind="attend"))
    return out


def _mlp(name: str, count: int, m: ModelShape, ff: float, act: float) -> list[Operator]:
    up = (m.ff_mats - 1) * ff
    return [
        _gemm(f"{name}_up", count, m.d * up, m.d, up, m.weight_bytes, act),
        _gemm(f"{name}_down", count, m.d * ff, ff, m.d, m.weight_bytes, act),
    ]


def _moe(m: ModelShape, count: int, tp: int, act: float) -> list[Operator]:
    """Router, the experts that were touched, and the shared expert; experts are split by columns over the devices."""
    ff, k = m.expert_ff / tp, m.top_k
    numbers = m.ff_mats * m.d * ff
    experts = Operator(
        "experts", count, _row(rows=2 * numbers * k), _row(experts=numbers * m.weight_bytes, rows=k * (2 * m.d + m.ff_mats * ff) * act),
        _row(), kind="gemm",
    )  # fmt: skip
    ops = [_gemm("router", count, m.d * m.experts, m.d, m.experts, m.weight_bytes, act), experts]
    return ops + (_mlp("shared", count, m, m.shared_ff / tp, act) if m.shared_ff else [])


@njit(cache=True)
def _sizes(f, window, experts, top_k, out):  # type: ignore[no-untyped-def]
    """The eight sizes of a step from its features. A chunk's causal half is taken off as if one prompt held all prompt rows."""
    chunks = max(1.0, f[1] - f[2])
    # row_context counts n x (c + n) for a chunk of n; causal attention does n c + n (n + 1) / 2.
    pairs = f[7] - max(0.0, f[3] * f[3] / chunks - f[3]) / 2
    mean = f[6] / max(1.0, f[1])
    share = min(1.0, window / mean) if window and mean > 0 else 1.0
    out[0], out[1], out[2], out[3], out[4] = 1.0, f[0], f[5], pairs, f[6]
    out[5], out[6] = pairs * share, f[6] * share
    # Experts touched by rows that choose top_k of them uniformly.
    out[7] = experts * (1.0 - (1.0 - top_k / experts) ** f[0]) if experts else 0.0


@njit(cache=True)
def _decoding(f, g):  # type: ignore[no-untyped-def]
    """Split a step whose prompt rows pass part of the layers: ``g`` = features of the rows that pass all of them; returns the prompts' share."""
    n = f[3]
    if f[8] >= 1.0 or n < 1.0 or f[0] - n < 1.0:
        return -1.0
    # kv_tokens = D + P and row_context = D + n P for decoding contexts D and one prompt's context P.
    prompt = (f[7] - f[6]) / (n - 1.0) if n > 1.0 else f[6] / max(1.0, f[1])
    g[:] = f
    g[0] = f[0] - n
    g[1] = max(1.0, f[2])
    g[3] = 0.0
    g[6] = max(0.0, f[6] - prompt)
    g[7] = g[6] * g[0] / g[1]
    return min(1.0, max(0.0, (f[8] * f[0] - g[0]) / n))


@njit(cache=True)
def _operator(op, size, speed, memory, link, alpha, start, ranks, launch, busy, n):  # type: ignore[no-untyped-def]
    """Seconds of ``n`` equal operators; their use of compute, memory and link is added to ``busy``."""
    flops = np.float64(0.0)
    moved = np.float64(0.0)
    wire = np.float64(0.0)
    for j in range(8):
        flops += op[0, j] * size[j]
        moved += op[1, j] * size[j]
        wire += op[2, j] * size[j]
    if flops + moved + wire <= 0:
        return 0.0
    a, b = flops / speed, moved / memory
    c = start + 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * wire / link if wire > 0 else 0.0
    busy[0] += n * a
    busy[1] += n * b
    busy[2] += n * c
    return n * (max(a, max(b, c)) + launch)


@njit(cache=True)
def _predict(features, ops, count, whole, window, experts, top_k, speed, memory, link, alpha, start, ranks, launch, overhead, side, power, out):  # type: ignore[no-untyped-def]
    """Seconds and joules; ``ops`` [n, 3, 8], ``speed`` [n], ``power`` = (static, compute, memory, link) watts."""
    size, part, g = np.empty(8), np.empty(8), np.empty(12)
    for i in range(len(features)):
        f = features[i]
        _sizes(f, window, experts, top_k, size)
        climbing = _decoding(f, g)
        if climbing >= 0:
            _sizes(g, window, experts, top_k, part)
        time, busy = overhead, np.zeros(3)
        for o in range(len(ops)):
            n = count[o]
            if not whole[o]:
                n *= climbing if climbing >= 0 else f[8]
            time += _operator(ops[o], size, speed[o], memory, link, alpha, start, ranks, launch, busy, n)
            if climbing >= 0 and not whole[o]:
                time += _operator(ops[o], part, speed[o], memory, link, alpha, start, ranks, launch, busy, count[o] - n)
        time += f[10] * side[0] + f[11]
        out[i, 0] = round(time * 1e6) / 1e6
        out[i, 1] = round((power[0] * time + power[1] * busy[0] + power[2] * busy[1] + power[3] * busy[2]) * 1e6) / 1e6


class Roofline:
    """Implements ``core.protocols.LatencyModel`` for a model on ``tp`` devices of one kind. ``version`` names what it was made from.

    ``only``: price operators of this kind alone (``gemm``, ``attend``), each ``times`` over, whatever the layer range.
    Raises ConfigError for several devices without a link.
    """

    def __init__(
        self, model: ModelShape, hardware: Hardware, tp: int = 1, dtype: str = "bfloat16", only: str | None = None, times: float = 1.0
    ) -> None:  # fmt: skip
        if tp > 1 and not hardware.link:
            raise ConfigError(f"{hardware.name} has no link, so tensor parallelism over {tp} devices cannot be priced", param="tensor_parallel_size")
        self.model, self.hardware, self.tp = model, hardware, tp
        self.version = f"roofline {model.name} on {tp} x {hardware.name} ({dtype}; calibrated on: {hardware.calibrated})"
        self.ops = [o for o in operators(model, tp) if only is None or o.kind == only]
        h = hardware
        self._ops = np.stack([np.stack([o.flops, o.bytes, o.wire]) for o in self.ops])
        self._count = times * np.array([o.count for o in self.ops], np.float64)
        self._whole = np.array([o.whole or only is not None for o in self.ops])
        self._speed = np.array([h.peak("bfloat16" if o.kind == "attend" else dtype) * h.compute_eff for o in self.ops])
        self._rates = (h.bandwidth * 1e9 * h.memory_eff, max(h.link, 1e-9) * 1e9 * h.link_eff)
        block = model.kv_token_bytes() / tp * 32
        self._side = np.array([2 * block / self._rates[0]])
        self.idle_watts = tp * h.watts * h.static
        self._power = tp * h.watts * np.array([h.static, 0.4, 0.2, 0.1])

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2]."""
        out = np.empty((len(features), 2))
        h, m = self.hardware, self.model
        _predict(
            features, self._ops, self._count, self._whole, float(m.window), float(m.experts), float(m.top_k), self._speed, *self._rates,
            h.link_alpha, h.link_start, self.tp, h.launch, h.overhead, self._side, self._power, out,
        )  # fmt: skip
        return out

    def observe(self, facts: Facts) -> None:
        """Nothing is learnt: a data sheet does not change."""

    def explain(self, features: Floats) -> list[dict[str, float | str]]:
        """Per operator of one step [12]: operations, bytes, seconds and which resource binds it."""
        size, h = np.empty(8), self.hardware
        _sizes(features, float(self.model.window), float(self.model.experts), float(self.model.top_k), size)
        found: list[dict[str, float | str]] = []
        for i, op in enumerate(self.ops):
            n = op.count * (1.0 if op.whole else float(features[8]))
            flops, moved, wire = float(op.flops @ size), float(op.bytes @ size), float(op.wire @ size)
            hops = (self.tp - 1) * 2
            link = h.link_start + hops * h.link_alpha + hops / self.tp * wire / self._rates[1] if wire else 0.0
            times = {"compute": flops / self._speed[i], "memory": moved / self._rates[0], "link": link}
            bound = max(times, key=lambda k: times[k])
            found.append({"op": op.name, "flops": n * flops, "bytes": n * moved, "wire": n * wire, "seconds": n * times[bound], "bound": bound})
        return found


def calibrated(
    model: ModelShape, hardware: Hardware, features: Floats, seconds: Floats, tp: int = 1, dtype: str = "bfloat16", on: str = ""
) -> Roofline:  # fmt: skip
    """The roofline whose efficiencies and overhead fit measured steps best (least median of relative errors over a grid)."""
    best, least = hardware, np.inf
    base = replace(hardware, launch=0.0, overhead=0.0)
    for compute in np.arange(0.2, 1.0, 0.05):
        for memory in np.arange(0.3, 1.0, 0.05):
            trial = replace(base, compute_eff=float(compute), memory_eff=float(memory))
            rest = seconds - Roofline(model, trial, tp, dtype).predict(features)[:, 0]
            spare = max(0.0, float(np.median(rest)))
            error = float(np.median(np.abs(rest - spare) / seconds))
            if error < least:
                best, least = replace(trial, overhead=spare, calibrated=on or f"{len(seconds)} steps"), error
    return Roofline(model, best, tp, dtype)
