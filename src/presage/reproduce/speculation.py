"""What the papers on speculation have in common: replays by position, and recorded texts through a virtual engine at a chosen load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.bench.draft import Recording, Replay, learn
from presage.core.config import EngineConfig
from presage.core.plan import Facts
from presage.core.protocols import LatencyModel
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.core.types import Floats
from presage.draft.length import make_length
from presage.reproduce.recipe import Job
from presage.simulate.latency.hardware import hardware
from presage.simulate.latency.roofline import Roofline
from presage.simulate.run import Result, Target, simulate
from presage.simulate.shape import ModelShape

LOOKUP = 4e-6
"""Seconds a look-up drafter is charged per request and step; ours takes less when it looks a whole batch up in one call."""


def by_position(out: Replay, places: int = 16) -> tuple[list[int], list[float]]:
    """Share of the steps whose k-th drafted id was accepted, for k = 1.. ``places``."""
    found = [n / max(1, out.steps) for n in out.position[:places]]
    return list(range(1, len(found) + 1)), found


class Charged:
    """A latency model plus what a look-up drafter costs per request in steps that verify drafts."""

    def __init__(self, inner: LatencyModel, per_request: float = LOOKUP) -> None:
        self.inner, self.per_request = inner, per_request

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2]."""
        out = self.inner.predict(features)
        out[:, 0] += np.where(features[:, 4] > 0, self.per_request * features[:, 1], 0.0)
        return out

    def observe(self, facts: Facts) -> None:
        """Nothing is learnt."""


def roofline(job: Job, model: str = "meta-llama--Meta-Llama-3.1-8B", device: str = "h100", tp: int = 1) -> Roofline:
    """A model of the data sets on ``tp`` devices, priced operator by operator."""
    return Roofline(ModelShape.of(job.data(f"model_configs/{model}_config.json")), hardware(device), tp)


def gpu(job: Job, model: str = "meta-llama--Meta-Llama-3.1-8B", device: str = "h100", tp: int = 1, max_len: int = 32768) -> Target:
    """The same as a target to simulate, its KV pool what the devices have left."""
    latency = roofline(job, model, device, tp)
    max_len = min(latency.model.max_len, max_len)
    geometry = latency.model.geometry(latency.hardware.memory, tp=tp, max_model_len=max_len)
    return Target(latency, geometry, latency.model.layers, max_len, idle_watts=latency.idle_watts)


@dataclass(frozen=True)
class Way:
    """One way to decode: a drafter and a length policy, both made anew per run; no drafter = plain decoding."""

    drafter: Callable[[], Any] | None = None
    length: str = "fixed"
    options: tuple[tuple[str, Any], ...] = ()
    cap: int = 16


def replayed(target: Target, rows: Sequence[Recording], past: Sequence[Recording], load: int, way: Way) -> Result:
    """Recorded requests, ``load`` at a time, through a virtual engine whose drafter knows ``past``."""
    requests = [
        Request(id=f"r{i}", prompt=one.prompt, sampling=SamplingParams(max_tokens=len(one.output), ignore_eos=True), extras={"reply": one.output})
        for i, one in enumerate(rows)
    ]
    config = EngineConfig.of(max_num_seqs=load, max_num_batched_tokens=2048 + way.cap * load)
    if way.drafter is None:
        return simulate(config, requests, target)
    drafter = way.drafter()
    learn(drafter, past)
    price = Target(Charged(target.latency), target.geometry, target.layers, target.max_model_len)
    length = make_length(way.length, **dict(way.options))
    return simulate(config, requests, price, max_drafts=way.cap * load, drafter=lambda: drafter, length=lambda: length)


def rate(result: Result) -> float:
    """Output tokens per second of decoding steps' time: steps with prompt rows count by the share of their other rows."""
    s = result.steps
    decoding = (s["t1"] - s["t0"]) * (1 - s["prompt_rows"] / np.maximum(1, s["rows"]))
    return float(result.requests["n_out"].sum() / decoding.sum())


def mean_of(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def crossing(what: str, loads: Sequence[float], ratio: Sequence[float], unit: str = "concurrent requests", level: float = 1.0) -> str:
    """A clause on ``what``: where its ratio falls to ``level`` for good, interpolated in the logarithm of the load."""
    above = [i for i, r in enumerate(ratio) if r > level]
    if not above:
        return f"{what} pays at no load (from {loads[0]:g} {unit} on)"
    last = above[-1]
    if last == len(loads) - 1:
        return f"{what} still pays {ratio[-1]:.2f}x at {loads[-1]:g} {unit}, the highest load tried"
    a, b = np.log(loads[last]), np.log(loads[last + 1])
    at = float(np.exp(a + (b - a) * (ratio[last] - level) / (ratio[last] - ratio[last + 1])))
    return f"{what} stops paying at about {at:.3g} {unit}"


def verify_seconds(latency: LatencyModel, batch: int, nodes: float, context: int) -> float:
    """Seconds of a step in which ``batch`` requests with ``context`` tokens each verify ``nodes`` drafted tokens."""
    rows, each = batch * (1 + nodes), context + 1 + nodes
    f = np.array([[rows, batch, batch, 0, batch * nodes, rows, batch * each, rows * each, 1.0, 0, 0, 0]])
    return float(latency.predict(f)[0, 0])
