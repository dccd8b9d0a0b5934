"""HexGen-Text2SQL: queries of a dozen dependent calls on unequal instances; who gets a call, and in which order calls wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm
from presage.reproduce.speculation import crossing, gpu, verify_seconds
from presage.schedule.deadline import stage_budget
from presage.schedule.dispatch import BalancedDispatch, Times
from presage.simulate.collect import Collector
from presage.simulate.driver import VirtualDriver
from presage.simulate.oracle import synthetic_base, synthetic_ids
from presage.simulate.run import Target, make_replica

STAGES = {  # prompt, output, prefix that all calls of the stage share
    "retrieve": (308, 5, 213), "keywords": (667, 45, 630), "candidate": (11748, 678, 9158), "revise": (5963, 79, 3059), "test": (275, 4, 213),
    "write test": (1109, 103, 436), "evaluate": (961, 22, 261),
}  # fmt: skip
STANDARD = ("retrieve", "keywords", *["retrieve"] * 3, "candidate", "revise", "revise", "test", "write test", "test", "evaluate", "test")
CARDS = ("a100-80", "a100-80", "a10g", "l4")
SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 1024}
ARMS = {  # dispatch, order
    "round robin, fcfs": ("robin", "fcfs"), "balanced, fcfs": ("balanced", "fcfs"), "round robin, urgency": ("robin", "deadline"),
    "balanced, urgency": ("balanced", "deadline"), "balanced, oldest query": ("balanced", "oldest"),
}  # fmt: skip
BASE, BOTH = "round robin, fcfs", "balanced, urgency"
CLAIMS = (
    Claim("both levels", "deadline 1.41x tighter on average, P95 1.42 to 1.56x lower", "round robin and FCFS", "2 A100, A10, L4 with Llama-3.1-8B; "
          "80 % of what balanced dispatch sustains; deadline that 95 % of queries meet", "1.3x tighter or better", 1.3),
    Claim("dispatch alone", "part of the gain", "round robin and FCFS", "the same", "1.1x tighter or better", 1.1),
    Claim("urgency alone", "part of the gain", "round robin and FCFS", "the same", "1.05x tighter or better", 1.05),
    Claim("urgency against oldest query", "no claim of the paper: the stronger baseline", "balanced, oldest query first", "the same",
          "1.05x tighter or better", 1.05),
    Claim("weight of suitability", "best alpha inside (0, 0.5]", "alpha 0: balance alone", "the same, best of 0.1 to 0.5", "1.02x tighter or better",
          1.02),
)  # fmt: skip


@dataclass
class Query:
    """One question: its stages are lists of calls that run in parallel; the next stage waits for all."""

    name: str
    arrival: float
    due: float
    stages: list[list[str]]
    at: int = -1
    open: int = 0
    done: float = 0.0
    said: list[int] = field(default_factory=list)


class Flow:
    """Turns queries into requests: the first stage when a query arrives, each further one when the last call of a stage ends."""

    def __init__(self, queries: list[Query], times: Times, order: str, seed: int = 5) -> None:
        self.of = {q.name: q for q in queries}
        self.times, self.order, self.rng = {s: float(np.mean(t)) for s, t in times.items()}, order, np.random.default_rng(seed)

    def after(self, request: Request, now: float) -> Iterable[Request]:
        """The calls that a finished call allows."""
        q = self.of[request.id.split("/")[0]]
        q.open -= 1
        return [] if q.open else self.next(q, now)

    def next(self, q: Query, now: float) -> list[Request]:
        """The calls of a query's next stage."""
        q.at += 1
        if q.at == len(q.stages):
            q.done = now
            return []
        calls = q.stages[q.at]
        q.open = len(calls)
        return [self._request(q, i, stage, now) for i, stage in enumerate(calls)]

    def _request(self, q: Query, i: int, stage: str, now: float) -> Request:
        n, said, shared = STAGES[stage]
        name = f"{q.name}/{q.at}/{i}"
        prompt = np.concatenate([synthetic_ids(synthetic_base(stage), 0, shared), synthetic_ids(synthetic_base(name), 0, n - shared)])
        length = max(1, round(said * float(np.exp(self.rng.normal(0, 0.3)))))
        left = [s for part in q.stages[q.at + 1 :] for s in part[:1]]
        due = q.arrival if self.order == "oldest" else now + stage_budget(q.due - now, stage, left, self.times)
        return Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=length, ignore_eos=True), arrival=now, stage=stage,
                       extras={"due": due})  # fmt: skip


def run(job: Job) -> Measured:
    """All arms at one load, the weight alpha, then the gain by load."""
    targets = [gpu(job, device=card, max_len=16384) for card in CARDS]
    times = {s: [_alone(t, *STAGES[s]) for t in targets] for s in STAGES}
    whole = sum(float(np.mean(times[s])) for s in STANDARD)
    n = job.pick(32, 3)
    # One query at a time on each instance, and what batching adds.
    sustained = 1.6 * sum(1 / sum(times[s][i] for s in STANDARD) for i in range(len(CARDS)))
    loads = [0.5, 0.8] if not job.quick else [0.8]
    found = {(name, x): _scales(n, x * sustained, whole, targets, times, *how) for name, how in ARMS.items() for x in loads}
    tight = {k: float(np.percentile(v, 95)) for k, v in found.items()}
    job.say(", ".join(f"{k}: {tight[k, loads[-1]]:.2f}" for k in ARMS))
    alphas = [0.0, 0.1, 0.4] if not job.quick else [0.0, 0.4]
    by_alpha = [float(np.percentile(_scales(n, loads[-1] * sustained, whole, targets, times, "balanced", "deadline", a), 95)) for a in alphas]
    gain = {k: [tight[BASE, x] / tight[k, x] for x in loads] for k in ARMS if k != BASE}
    return Measured(
        values={
            "both levels": gain[BOTH][-1],
            "dispatch alone": gain["balanced, fcfs"][-1],
            "urgency alone": gain["round robin, urgency"][-1],
            "urgency against oldest query": tight["balanced, oldest query", loads[-1]] / tight[BOTH, loads[-1]],
            "weight of suitability": by_alpha[0] / min(by_alpha[1:]),
        },
        stops="tighter deadlines by load: " + "; ".join(f"{k} " + ", ".join(f"{g:.2f}x at {x:g}" for x, g in zip(loads, v)) for k, v in gain.items())
        + ". " + crossing("Urgency over FCFS behind balanced dispatch", loads, [a / b for a, b in zip(gain[BOTH], gain["balanced, fcfs"])],
                          "of the load", 1.02),
        panels=[
            Panel("deadline that 95 % meet", "load", "times the unloaded query", {k: (loads, [tight[k, x] for x in loads]) for k in ARMS}, logy=True),
            Panel("attainment at the highest load", "deadline, times the unloaded query", "share of queries", {
                k: _attainment(found[k, loads[-1]]) for k in ARMS}),
            Panel("balanced, urgency", "alpha", "deadline that 95 % meet", {"alpha": (alphas, by_alpha)}),
        ],
        grids=[Grid("Deadline that 95 % of queries meet, in unloaded queries", ["arm", *(f"load {x:g}" for x in loads)], [
            [k, *(f"{tight[k, x]:.2f}" for x in loads)] for k in ARMS])],
        notes=["Stages, their lengths and shared prefixes are the public simulator's (CHESS on BIRD); the model is 8B instead of 70B.",
               "Outstanding work is taken off when a call ends, which the published code does not do; stage budgets as published."],
    )  # fmt: skip


def _alone(t: Target, n: int, said: int, shared: int) -> float:
    """Seconds of a call by itself, its shared prefix in the cache."""
    rows = n - shared
    f = np.array([[rows, 1, 0, rows, 0, 1, n, rows * n, 1, 0, 0, 0]], float)
    return float(t.latency.predict(f)[0, 0]) + said * verify_seconds(t.latency, 1, 0, n)


def _scales(n: int, rate: float, whole: float, targets: list[Target], times: Times, dispatch: str, order: str, alpha: float = 0.2) -> np.ndarray:
    """Latency of each query over that of an unloaded standard query."""
    rng = np.random.default_rng(3)
    at = np.cumsum(rng.exponential(1 / rate, n))
    queries = []
    for i, t in enumerate(at.tolist()):
        candidates, revises = int(rng.integers(1, 6)), min(10, int(rng.geometric(0.5)))
        stages = [["retrieve"], ["keywords"], *[["retrieve"]] * 3, ["candidate"] * candidates, *[["revise"]] * revises, ["test"], ["write test"],
                  ["test"], ["evaluate"], ["test"]]  # fmt: skip
        queries.append(Query(f"q{i}", t, t + 3 * whole, stages))
    flow, balanced, turn = Flow(queries, times, order), BalancedDispatch(times, alpha), [-1]

    def robin(request: Request, replicas: Any) -> int:
        turn[0] = (turn[0] + 1) % len(replicas)
        return turn[0]

    def after(request: Request, now: float) -> Iterable[Request]:
        balanced.ended(request)
        return flow.after(request, now)

    arm, out = Arm("fcfs" if order == "fcfs" else "deadline", {} if order == "fcfs" else {"relegate": False}, settings=SETTINGS), Collector()
    config = arm.config()
    replicas = []
    for i, target in enumerate(targets):
        parts = arm.parts(config)
        replicas.append(make_replica(config, target, out, i, scheduler=parts.pop("scheduler"), parts=parts))
    first = (r for q in queries for r in flow.next(q, q.arrival))
    VirtualDriver(replicas, first, balanced if dispatch == "balanced" else robin, after).run()
    return np.array([(q.done - q.arrival) / whole for q in queries])


def _attainment(scales: np.ndarray) -> tuple[list[float], list[float]]:
    grid = np.geomspace(0.5, max(2.0, float(scales.max())), 24)
    return grid.tolist(), [float((scales <= g).mean()) for g in grid]


RECIPE = Recipe("HexGen-Text2SQL: workflows on unequal instances", "Peng et al., 2025, arXiv 2505.05286", "simulation", CLAIMS, run)
