"""Layered prefill: a mixture of experts reads each expert once a prompt instead of once a chunk; a dense model gains nothing."""

from __future__ import annotations

from typing import Any

from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, at_rate, gaps, lengths, percentile, steady_rate
from presage.reproduce.speculation import crossing, gpu
from presage.simulate.run import Result

SETTINGS: dict[str, Any] = {"max_num_seqs": 128, "enable_prefix_caching": False}
ARMS = {
    "chunks of 512": Arm(settings=SETTINGS | {"max_num_batched_tokens": 512}),
    "layered": Arm("layered", settings=SETTINGS | {"max_num_batched_tokens": 1024}),
}
CLAIMS = (
    Claim("first token", "mean TTFT 1019 to 713 ms, down to -70 %", "chunks of 512", "arXiv at 85 % load; Qwen3-30B-A3B on 2 H100 by roofline",
          "1.2x sooner or better", 1.2),
    Claim("whole answer", "9.4 to 5.5 s (-41 %)", "chunks of 512", "the same, mean", "1.1x sooner or better", 1.1),
    Claim("energy", "-8 to -9 % a token at equal rate, -22 % at the highest", "chunks of 512", "the same, J a token", "1.05x less or better", 1.05),
    Claim("sustained rate", "+14 to +45 %", "chunks of 512", "all requests at once", "1.1x or more", 1.1),
    Claim("time between tokens", "P99 36.8 to 27.9 ms", "chunks of 512", "arXiv at 85 % load, P99", "no worse than 1.1x", 1.1, 1.5),
    Claim("dense model", "gains nothing", "chunks of 512", "Qwen3-8B, arXiv at 85 % load, mean TTFT", "at most 1.1x sooner", 1.1,
          1.4),
)  # fmt: skip
MODELS = {"moe": ("Qwen--Qwen3-30B-A3B", 2), "dense": ("Qwen--Qwen3-8B", 1)}


def run(job: Job) -> Measured:
    """Both models: sustained rate, then a sweep of loads."""
    sizes, loads = lengths(job, "arxiv", job.pick(250, 30)), [0.3, 0.5, 0.7, 0.85, 1.0] if not job.quick else [0.3, 0.85]
    found: dict[tuple[str, str], list[Result]] = {}
    top: dict[tuple[str, str], float] = {}
    for kind, (model, tp) in MODELS.items():
        target = gpu(job, model, "h100", tp, 8192)
        for name, arm in ARMS.items():
            top[kind, name] = steady_rate(arm.run(at_rate(sizes, float("inf")), target, keep=False))
        rate = top[kind, "chunks of 512"]
        for name, arm in ARMS.items():
            some = loads if kind == "moe" else [0.85]
            found[kind, name] = [arm.run(at_rate(sizes, x * rate), target) for x in some]
        job.say(f"{kind}: {rate:.2f} requests/s in chunks, {top[kind, 'layered'] / rate:.2f}x in layers")
    old, new, at = found["moe", "chunks of 512"], found["moe", "layered"], loads.index(0.85)
    sooner = [a.ttft.mean() / b.ttft.mean() for a, b in zip(old, new)]
    dense = found["dense", "chunks of 512"][0].ttft.mean() / found["dense", "layered"][0].ttft.mean()
    between = {k: [1e3 * percentile(gaps(r), 99) for r in found["moe", k]] for k in ARMS}
    return Measured(
        values={
            "first token": float(sooner[at]),
            "whole answer": float(old[at].e2e.mean() / new[at].e2e.mean()),
            "energy": _joules(old[at]) / _joules(new[at]),
            "sustained rate": top["moe", "layered"] / top["moe", "chunks of 512"],
            "time between tokens": between["layered"][at] / between["chunks of 512"][at],
            "dense model": float(dense),
        },
        stops=crossing("the gain in mean TTFT", loads, sooner, "of the sustained load", 1.02) + f"; on a dense model TTFT is {dense:.2f}x as good.",
        panels=[
            Panel("Qwen3-30B-A3B, arXiv", "share of sustained load", "mean TTFT, s",
                  {k: (loads, [r.ttft.mean() for r in found["moe", k]]) for k in ARMS}, logy=True),
            Panel("time between tokens", "share of sustained load", "P99, ms", {k: (loads, v) for k, v in between.items()}),
            Panel("energy", "share of sustained load", "J a token", {k: (loads, [_joules(r) for r in found["moe", k]]) for k in ARMS}),
        ],
        grids=[Grid("arXiv at 85 % of the rate that chunks sustain", ["model", "policy", "TTFT, s", "E2E, s", "J a token", "sustained, 1/s"], [
            [kind, name, f"{r.ttft.mean():.2f}", f"{r.e2e.mean():.2f}", f"{_joules(r):.2f}", f"{top[kind, name]:.2f}"]
            for (kind, name), rs in found.items() for r in [rs[at if kind == "moe" else 0]]])],
        notes=["Experts touched are those that rows with uniform routing would touch; skewed routing would touch fewer in both.",
               "The engine's own `layered` policy on the simulator's clock; the same policy runs on the real engine with the same tokens as chunks."],
    )  # fmt: skip


def _joules(r: Result) -> float:
    return float(r.joules / r.requests["n_out"].sum())


RECIPE = Recipe("Layered prefill: groups of layers instead of chunks of tokens", "arXiv 2510.08055", "simulation", CLAIMS, run)
