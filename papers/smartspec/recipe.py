"""SmartSpec: the length policies of the engine, in the engine's loop on a virtual clock, against every fixed length at every load."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from presage.bench.workloads import Requests, Workload
from presage.core.config import EngineConfig
from presage.core.plan import Draft, Facts, Grants, NewIds, StepDone, StepPlan
from presage.core.protocols import EngineView, LatencyModel
from presage.core.request import Request
from presage.core.types import EMPTY, Floats, Ints
from presage.draft.length import make_length
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.speculation import crossing, gpu, rate
from presage.simulate.oracle import LawOracle
from presage.simulate.run import Target, simulate

ALPHAS, MOST, CAP = (0.2, 0.5, 0.8), 7, 8
LOADS = (1, 8, 32, 96, 256)
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"fixed {k}": ("fixed", {"num_speculative_tokens": k}) for k in (0, 1, 3, 7)},
    "goodput": ("goodput", {"num_speculative_tokens": MOST}),
    "goodput, per request": ("goodput", {"num_speculative_tokens": MOST, "per_request": True}),
    "marginal (ours)": ("marginal", {"num_speculative_tokens": MOST}),
}
CLAIMS = (
    Claim("against no speculation, light load", "latency up to 3.2x lower", "no drafts", "1 request at a time, acceptance 0.2, 0.5 or 0.8",
          "1.3x tokens a second", 1.3),
    Claim("against a fixed length, heavy load", "a fixed length hurts under load", "always 7 drafts", "256 requests", "1.2x or more", 1.2),
    Claim("never worse than no speculation", "consistently at least as good", "no drafts", "worst of all loads", "0.97x or better", 0.97, 0.85),
    Claim("near the best length at each load", "adapts to the load", "best fixed length at that load", "worst of all loads", "0.95x or better",
          0.95, 0.8),
    Claim("per request against one length", "requests that accept more get more", "goodput, one length for all", "mean over loads",
          "1.02x or more", 1.02),
    Claim("marginal against goodput", "ours; no claim of the paper", "goodput", "mean over loads", "1.02x or more", 1.02),
)  # fmt: skip


class DraftModel:
    """A draft model as the loop sees it: chains with known chances, and one pass of ``seconds`` per level of the longest chain.

    Each request has its own rate out of ``ALPHAS``; the oracle lets drafts come true with the probability given here.
    """

    host, source = False, "model"

    def __init__(self, seconds: float) -> None:
        self.seconds, self.alpha = seconds, np.zeros(8)
        self.known = np.zeros(8, np.int64)

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot."""
        if slot >= len(self.alpha):
            self.alpha = np.concatenate([self.alpha, np.zeros(max(slot + 1, len(self.alpha)))])
        self.alpha[slot] = ALPHAS[int(req.id[1:]) % len(ALPHAS)]

    def hint(self, view: EngineView) -> Ints:
        """All may draft."""
        return np.full(view.table.capacity, MOST, np.int32)

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """Passes that take time, then chains."""
        n = grants.draft
        if n.any():
            yield _pass(int(n.max()) * self.seconds)
        offset = np.concatenate([[0], np.cumsum(n)]).astype(np.int32)
        owner = np.repeat(np.arange(len(n)), n)
        depth = (np.arange(offset[-1]) - offset[owner] + 1).astype(np.int32)
        prob = (self.alpha[grants.slot[owner]] ** depth).astype(np.float32)
        parent = depth - 2
        return Draft(offset, np.full(len(depth), 7, np.int32), parent, depth, prob)

    def advance(self, new: NewIds) -> None:
        """Chances do not depend on ids."""

    rewind = fork = load = lambda self, *a: None

    def save(self, slot: int) -> bytes | None:
        """Nothing to keep."""
        return None

    def close(self, slot: int) -> None:
        """Nothing to free."""


def _pass(seconds: float) -> StepPlan:
    """A plan without rows that takes ``seconds``."""
    none = Draft.none(0)
    plan = StepPlan(
        id=-1, lane=0, slot=EMPTY, start=EMPTY, count=EMPTY, nodes=EMPTY, layer0=EMPTY, layer1=EMPTY, want=np.empty(0, np.uint8),
        rows=np.zeros(1, np.int32), ids=EMPTY, position=EMPTY, index=EMPTY, tables=(), draft=none,
    )  # fmt: skip
    plan.features[1], plan.features[11] = 1e-9, seconds
    return plan


class WithPasses:
    """The target's latency model; steps without rows take what they say."""

    def __init__(self, inner: LatencyModel) -> None:
        self.inner = inner

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2]."""
        out = self.inner.predict(features)
        out[:, 0] = np.where(features[:, 0] > 0, out[:, 0], features[:, 11])
        return out

    def observe(self, facts: Facts) -> None:
        """Nothing is learnt."""


def run(job: Job) -> Measured:
    """Tokens per second of every policy at every load, on the same requests."""
    base = gpu(job, device="a100-80")
    target = Target(WithPasses(base.latency), base.geometry, base.layers, 4096)
    loads = LOADS if not job.quick else (1, 32)
    speeds = {name: [_rate(job, target, name, load) for load in loads] for name in POLICIES}
    plain, fixed = np.array(speeds["fixed 0"]), np.array([v for n, v in speeds.items() if n.startswith("fixed")])
    goodput, each, ours = (np.array(speeds[n]) for n in ("goodput", "goodput, per request", "marginal (ours)"))
    ratios = {n: (np.array(v) / plain).tolist() for n, v in speeds.items() if n != "fixed 0"}
    return Measured(
        values={
            "against no speculation, light load": float(goodput[0] / plain[0]),
            "against a fixed length, heavy load": float(goodput[-1] / speeds["fixed 7"][-1]),
            "never worse than no speculation": float((goodput / plain).min()),
            "near the best length at each load": float((goodput / fixed.max(0)).min()),
            "per request against one length": float(np.mean(each / goodput)),
            "marginal against goodput": float(np.mean(ours / goodput)),
        },
        stops="; ".join(crossing(n, loads, r) for n, r in ratios.items()),
        panels=[
            Panel("accepted by position (given to the simulator)", "place in the draft", "share of requests that get there",
                  {f"rate {a}": (list(range(1, CAP)), [a**k for k in range(1, CAP)]) for a in ALPHAS}),
            Panel("Llama-3.1-8B, A100 (roofline)", "concurrent requests", "tokens/s against no speculation",
                  {n: (loads, r) for n, r in ratios.items()}, logx=True, level=1.0),
        ],
        grids=[Grid("Tokens a second", ["policy", *map(str, loads)], [[n, *(f"{x:.0f}" for x in v)] for n, v in speeds.items()])],
        notes=[
            "Policies learn step time, acceptance and the cost of drafting while they run, as in the engine; nothing is told to them.",
            f"A draft token comes true with the request's own rate, one of {', '.join(map(str, ALPHAS))}. A level of drafting takes 0.5 ms.",
        ],
    )  # fmt: skip


def _rate(job: Job, target: Target, name: str, load: int) -> float:
    kind, options = POLICIES[name]
    n = max(job.pick(12, 3), job.pick(4, 2) * load)
    rng = np.random.default_rng(1)
    trace = Requests(Workload("r", np.zeros(n), rng.integers(200, 600, n), rng.integers(100, job.pick(300, 150), n)))
    config = EngineConfig.of(max_num_seqs=load, max_num_batched_tokens=2048 + CAP * load)
    found = simulate(
        config, trace, target, max_drafts=CAP * load, oracle=lambda: LawOracle(seed=3),
        drafter=lambda: DraftModel(5e-4), length=lambda: make_length(kind, **options),
    )  # fmt: skip
    job.say(f"{name}, {load}: {rate(found):.0f} tokens/s")
    return rate(found)


RECIPE = Recipe(
    "SmartSpec: draft length by predicted goodput", "Liu et al., arXiv 2406.14066 (TurboSpec in its third version)", "simulation", CLAIMS, run
)  # fmt: skip
