"""Dynamic SplitFuse: passes of one size, against whole prompts first; long prompts with short outputs, and the control where nothing is gained."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, PrefillFirst, at_rate, gaps, percentile
from presage.reproduce.speculation import crossing, gpu
from presage.simulate.run import Result

WHOLE: dict[str, Any] = {"max_num_batched_tokens": 8192, "enable_chunked_prefill": False, "enable_prefix_caching": False}
SPLIT: dict[str, Any] = WHOLE | {"max_num_batched_tokens": 2048, "enable_chunked_prefill": True}
NAMES = ("whole prompts first", "whole prompts beside decodes", "splitfuse")
STRICT = 0.1
CLAIMS = (
    Claim("even passes", "every pass the same size", "whole prompts first", "16 clients, prompts 2600, outputs 60; variation of tokens a pass",
          "a fifth of it or less", 0.2, 1.0),
    Claim("token latency", "P95 3.7x lower than vLLM", "whole prompts first", "the same, P95 of gaps", "2x lower or better", 2.0),
    Claim("effective throughput", "2.3x within the objective", "whole prompts first", "the same; requests/s whose every gap is within 100 ms",
          "1.5x or more", 1.5),
    Claim("throughput", "2x at equal latency", "whole prompts first", "the same, requests/s", "no less than 0.95x", 0.95, 0.8),
    Claim("control", "vLLM's authors: no gain for short prompts", "whole prompts first", "prompts 500, outputs 500; requests/s", "within 5 %",
          0.95, 0.8),
    Claim("first token", "worse by construction", "whole prompts first", "2600 and 60, median from start of service", "at most 2x", 2.0, 6.0),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Closed loops of clients by policy and number of clients, on both workloads."""
    target, rng, n = gpu(job, device="a100-80", max_len=8192), np.random.default_rng(0), job.pick(192, 40)
    work = {
        "long": (np.clip(rng.normal(2600, 780, n), 64, 8000).astype(int), np.clip(rng.normal(60, 18, n), 2, 400).astype(int)),
        "control": (np.full(n, 500), np.clip(rng.normal(500, 50, n), 2, 900).astype(int)),
    }
    clients = [1, 4, 8, 16, 32] if not job.quick else [4, 16]
    found = {(kind, name, c): _arm(name, c).run(at_rate(work[kind], float("inf")), target)
             for kind in work for name in NAMES for c in (clients if kind == "long" else [16])}  # fmt: skip
    old, _, new = (found["long", name, 16] for name in NAMES)
    tail = {name: [1e3 * percentile(gaps(found["long", name, c]), 95) for c in clients] for name in NAMES}
    first = [np.median(r.requests["first"] - r.requests["start"]) for r in (new, old)]
    control = [_rate(found["control", name, 16]) for name in (NAMES[2], NAMES[0])]
    gain = [a / b for a, b in zip(tail[NAMES[0]], tail["splitfuse"])]
    return Measured(
        values={
            "even passes": _variation(new) / _variation(old),
            "token latency": gain[clients.index(16)],
            "effective throughput": _effective(new) / max(_effective(old), 1e-3),
            "throughput": _rate(new) / _rate(old),
            "control": control[0] / control[1],
            "first token": float(first[0] / first[1]),
        },
        stops=crossing("the gain in P95 token latency", clients, gain, "clients") + "; by clients: "
        + ", ".join(f"{g:.2f}x at {c}" for c, g in zip(clients, gain))
        + f". With prompts and outputs of 500 tokens throughput is {control[0] / control[1]:.2f}x.",
        panels=[
            Panel("prompts 2600, outputs 60", "clients", "P95 between tokens, ms", {k: (clients, v) for k, v in tail.items()}, logx=True, logy=True),
            Panel("throughput", "clients", "requests/s", {k: (clients, [_rate(found["long", k, c]) for c in clients]) for k in NAMES}, logx=True),
            Panel("size of passes, 16 clients", "tokens a pass", "share of passes", {k: _histogram(found["long", k, 16]) for k in NAMES}),
        ],
        grids=[Grid("16 clients", ["workload", "policy", "requests/s", "variation of pass size", "P95 gap, ms", "longest gap, ms"], [
            [kind, k, f"{_rate(r):.2f}", f"{_variation(r):.2f}", f"{1e3 * percentile(gaps(r), 95):.0f}", f"{1e3 * gaps(r).max():.0f}"]
            for kind in work for k in NAMES for r in [found[kind, k, 16]]])],
        notes=["Llama-3.1-8B on an A100 by roofline; passes of 768 tokens. Clients are seats: the next request starts when one ends."],
    )  # fmt: skip


def _arm(name: str, clients: int) -> Arm:
    seats = {"max_num_seqs": clients}
    if name == "splitfuse":
        return Arm("splitfuse", {"target": 768}, settings=SPLIT | seats)
    return Arm(make=PrefillFirst if name == NAMES[0] else None, settings=WHOLE | seats)


def _rate(r: Result) -> float:
    return len(r.ids) / r.duration


def _effective(r: Result) -> float:
    good = [np.diff(t).max(initial=0) <= STRICT for t in r.tokens.values()]
    return sum(good) / r.duration


def _passes(r: Result) -> np.ndarray:
    """Sizes of all passes while there was a queue."""
    s = r.steps
    busy = s["t1"] <= r.requests["start"].max()
    return np.repeat(s["rows"][busy], s["repeat"][busy].astype(int))


def _variation(r: Result) -> float:
    sizes = _passes(r)
    return float(sizes.std() / sizes.mean())


def _histogram(r: Result) -> tuple[list[float], list[float]]:
    edges = np.array([0, 32, 128, 256, 512, 767, 1024, 2048, 4096, 8192])
    counts, _ = np.histogram(_passes(r), edges)
    return edges[1:].tolist(), (counts / counts.sum()).tolist()


RECIPE = Recipe("Dynamic SplitFuse: passes of equal size", "Holmes et al. (DeepSpeed-FastGen), arXiv 2401.08671", "simulation", CLAIMS, run)
