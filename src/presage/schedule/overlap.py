"""What overlapping nano-batches is worth: NanoFlow's search (arXiv 2408.12757) on the operators of a latency model.

A layer is a chain of operations, each bound by one resource: compute (GEMM), memory (decode attention) or network (collectives). Nano-batches
pass the chain one behind the other; operations of different resources run together and share the device's execution units: with the share R
a GEMM runs at R of its speed, but a memory-bound kernel at 0.3 of its speed for R = 0.2 and a collective at 0.5 (the paper's measured table).
That gap is the whole gain; what is paid for it is that weights are read once per nano-batch. Where the sum is a loss, steps run unsplit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, Protocol

import numpy as np

from presage.core.plan import Facts
from presage.core.types import Floats

COMPUTE, MEMORY, NETWORK = "compute", "memory", "network"
SHARED = {
    MEMORY: ((0.0, 0.1, 0.2, 0.4, 0.8, 0.9, 1.0), (0.0, 0.2, 0.3, 0.8, 0.85, 0.95, 1.0)),
    NETWORK: ((0.0, 0.1, 0.2, 0.8, 0.9, 1.0), (0.0, 0.3, 0.5, 0.9, 1.0, 1.0)),
}
"""Share of execution units -> share of its own speed; published points, straight lines between them."""
LINEAR = {MEMORY: ((0.0, 1.0), (0.0, 1.0)), NETWORK: ((0.0, 1.0), (0.0, 1.0))}
"""No benefit of sharing: the control, under which no plan may gain."""
Curve = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class Operation:
    """One operation of a layer for one nano-batch: seconds when it has the device to itself, and what binds it."""

    resource: str
    seconds: float


@dataclass(frozen=True)
class Overlap:
    """A found plan. ``cuts``: shares of the rows; ``share``: execution units of memory and network operations beside a GEMM."""

    cuts: tuple[float, ...]
    share: dict[str, float]
    seconds: float
    sequential: float

    @property
    def gain(self) -> float:
        """Sequential over overlapped time of a layer."""
        return self.sequential / self.seconds


def makespan(chains: Sequence[Sequence[Operation]], share: dict[str, float], layers: int = 1, curve: Curve = SHARED) -> float:
    """Seconds until every nano-batch has passed its chain ``layers`` times.

    A resource serves one operation at a time, the one that is furthest behind (lowest place in the chain, then first nano-batch); speeds
    change whenever an operation ends.
    """
    length = len(chains[0])
    place, left = [0] * len(chains), [c[0].seconds for c in chains]
    now = 0.0
    while True:
        running: dict[str, int] = {}
        for i in sorted((i for i, p in enumerate(place) if p < length * layers), key=lambda i: (place[i], i)):
            running.setdefault(chains[i][place[i] % length].resource, i)
        if not running:
            return now
        speed = _speeds(running, share, curve)
        step = min(left[i] / speed[r] for r, i in running.items())
        now += step
        for r, i in running.items():
            left[i] -= step * speed[r]
            if left[i] <= 1e-15:
                place[i] += 1
                left[i] = chains[i][place[i] % length].seconds


def _speeds(running: dict[str, int], share: dict[str, float], curve: Curve) -> dict[str, float]:
    """Speed of what runs together. Beside a GEMM each takes its share and the GEMM gets the rest; without one, shares are scaled up."""
    if len(running) == 1:
        return dict.fromkeys(running, 1.0)
    others = {r: share[r] for r in running if r != COMPUTE}
    scale = 1.0 if COMPUTE in running else 1.0 / sum(others.values())
    speed = {r: float(np.interp(s * scale, *curve[r])) for r, s in others.items()}
    if COMPUTE in running:
        speed[COMPUTE] = 1.0 - sum(others.values())
    return speed


def per_layer(chains: Sequence[Sequence[Operation]], share: dict[str, float], curve: Curve = SHARED) -> float:
    """Seconds of a layer in the steady state: what three more layers cost, so that filling and draining the pipeline do not count."""
    return (makespan(chains, share, 6, curve) - makespan(chains, share, 3, curve)) / 3


def cut_evenly(chain: Sequence[Operation], cuts: Sequence[float], price: float = 0.1) -> list[list[Operation]]:
    """A chain measured for the whole batch, by nano-batch; a GEMM costs ``price`` more when cut (the paper's ablation: 8 to 13 %)."""
    edges = [0.0, *cuts, 1.0]
    more = 1.0 + (price if cuts else 0.0)
    return [[Operation(o.resource, o.seconds * (b - a) * (more if o.resource == COMPUTE else 1.0)) for o in chain] for a, b in pairwise(edges)]


CUTS = ((0.5,), (0.375,), (0.25,), (0.33, 0.67), (0.25, 0.5, 0.75))
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


def search(cut: Any, curve: Curve = SHARED, cuts: Sequence[tuple[float, ...]] = CUTS) -> Overlap:
    """The best of a grid of cuts and shares. ``cut(cuts) -> chains``; the unsplit batch is among the candidates, so a plan never loses."""
    whole = cut(())
    sequential = sum(o.seconds for o in whole[0])
    best = Overlap((), {MEMORY: 0.2, NETWORK: 0.2}, sequential, sequential)
    for c, memory, network in product(cuts, SHARES, SHARES[:3]):
        chains, share = cut(c), {MEMORY: memory, NETWORK: network}
        seconds = per_layer(chains, share, curve)
        if seconds < best.seconds:
            best = Overlap(c, share, seconds, sequential)
    return best


class Explains(Protocol):
    """A latency model that can say what a step consists of (``simulate.latency.roofline.Roofline``)."""

    def predict(self, features: Floats) -> Floats: ...
    def observe(self, facts: Facts) -> None: ...
    def explain(self, features: Floats) -> list[dict[str, float | str]]: ...


OUTSIDE = ("embed", "lm_head")
_BOUND = {"compute": COMPUTE, "memory": MEMORY, "link": NETWORK}


@dataclass
class Overlapped:
    """A ``LatencyModel``: steps of at least ``least`` rows are priced as overlapped nano-batches where that is faster, others as ``base``.

    The plan is searched once, at the first such step (NanoFlow's pipeline is static as well), and then priced for each step's own sizes.
    """

    base: Explains
    layers: int
    least: int = 512
    curve: Curve = field(default_factory=lambda: SHARED)
    plan: Overlap | None = None

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2]; energy stays what the work costs, less the idle share of the time saved."""
        out = self.base.predict(features)
        for i in np.flatnonzero(features[:, 0] >= self.least).tolist():
            out[i, 0] -= self.saved(features[i])
        return out

    def observe(self, facts: Facts) -> None:
        """Nothing is learnt here."""
        self.base.observe(facts)

    def saved(self, f: Floats) -> float:
        """Seconds that overlap saves in a step with features [12], to the microsecond; 0 where it would lose."""

        def cut(cuts: Sequence[float]) -> list[list[Operation]]:
            return self.chains(f, cuts)

        if self.plan is None:
            self.plan = search(cut, self.curve)
        if not self.plan.cuts:
            return 0.0
        whole = sum(o.seconds for o in cut(())[0])
        split = per_layer(cut(self.plan.cuts), self.plan.share, self.curve)
        return round(max(0.0, whole - split) * self.layers * float(f[8]), 6)

    def chains(self, f: Floats, cuts: Sequence[float]) -> list[list[Operation]]:
        """The operations of a layer per nano-batch: each range is a smaller step that reads all weights again."""
        edges = [0.0, *cuts, 1.0]
        out = []
        for a, b in pairwise(edges):
            part = f.copy()
            part[:8] *= b - a
            part[8] = 1.0
            out.append(self._chain(part))
        return out

    def _chain(self, f: Floats) -> list[Operation]:
        """Operations of one layer in order; the all-reduces stand behind attention and MLP, half of them each."""
        chain: list[Operation] = []
        found = [o for o in self.base.explain(f) if o["op"] not in OUTSIDE]
        wire = sum(float(o["seconds"]) for o in found if o["op"] == "all_reduce") / self.layers / 2
        for o in found:
            if o["op"] == "all_reduce":
                continue
            chain.append(Operation(_BOUND[str(o["bound"])], float(o["seconds"]) / self.layers))
            if wire and o["op"] == "attn_out":
                chain.append(Operation(NETWORK, wire))
        return chain + ([Operation(NETWORK, wire)] if wire else [])
