"""Reasoning models: the swings of the KV cache, the stragglers, and what a thinking budget and admission by forecast do about them."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, at_rate, percentile, steady_rate
from presage.reproduce.speculation import crossing, gpu
from presage.simulate.run import Result, Target

LONGEST, BUDGET = 16384, 8192
SETTINGS: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "enable_prefix_caching": False, "max_model_len": 20480}
CLAIMS = (
    Claim("swings of the KV cache", "3 to 70 % within a run, below 3 % for ordinary models", "ordinary model, equal token load",
          "range of the tokens in the cache, middle of the run", "5x wider or more", 5.0),
    Claim("stragglers", "a few very long requests keep a batch alive", "ordinary model", "P99 over median of E2E", "2x larger or more", 2.0),
    Claim("thinking budget", "4 to 8k are enough", "no budget but 16k", "8k budget, P99 E2E", "0.8 of it or less", 0.8, 1.0),
    Claim("answers lost to the budget", "maths still solved within it", "no budget", "share of requests that wanted to think longer",
          "10 % or less", 10.0, 40.0, "%"),
    Claim("admission by forecast", "KV near 100 %: forecast its peak", "admission by present use", "pool of 30 % of the peak demand; preemptions",
          "0.3 of them or fewer", 0.3, 1.0),
    Claim("price of the forecast", "not in the paper", "admission by present use", "the same, requests/s", "no less than 0.95x", 0.95, 0.8),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Two arms at equal token load, the budget, then a small pool with and without forecast, by load."""
    n, target = job.pick(120, 60), gpu(job, device="h100", max_len=20480)
    short = job.pick(1, 8)  # a quick run thinks an eighth as long
    thinks, wanted = _reasoning(n, short)
    plain = _ordinary(n, int(thinks[1].sum()) * short, short)
    arm = Arm(settings=SETTINGS)
    rate = 0.6 * steady_rate(arm.run(at_rate(thinks, float("inf")), target, keep=False))
    # Equal token load: the ordinary model's requests are shorter, so more of them come in the same time.
    runs = {
        "reasoning": arm.run(at_rate(thinks, rate), target, keep=False),
        "ordinary": arm.run(at_rate(plain, rate * len(plain[0]) / n), target, keep=False),
        f"budget {BUDGET}": arm.run(at_rate((thinks[0], np.minimum(thinks[1], (BUDGET + 400) // short)), rate), target, keep=False),
    }
    tail = {k: percentile(r.e2e, 99) / percentile(r.e2e, 50) for k, r in runs.items()}
    swing = {k: _swing(r) for k, r in runs.items()}
    most = runs["reasoning"].steps["kv_tokens"].max()
    small = _pool(target, 0.3 * most, 20480 // short)
    loads = [0.75, 1.5] if not job.quick else [1.5]
    arms = {"present use": arm, "forecast": Arm("budget", settings=SETTINGS)}
    tight = {k: [a.run(at_rate(thinks, x * rate), small, keep=False) for x in loads] for k, a in arms.items()}
    lost = {k: [float(r.requests["preemptions"].sum()) for r in rs] for k, rs in tight.items()}
    speed = {k: [steady_rate(r) for r in rs] for k, rs in tight.items()}
    return Measured(
        values={
            "swings of the KV cache": swing["reasoning"] / swing["ordinary"],
            "stragglers": tail["reasoning"] / tail["ordinary"],
            "thinking budget": percentile(runs[f"budget {BUDGET}"].e2e, 99) / percentile(runs["reasoning"].e2e, 99),
            "answers lost to the budget": 100 * float((wanted > BUDGET / short).mean()),
            "admission by forecast": lost["forecast"][-1] / max(1.0, lost["present use"][-1]),
            "price of the forecast": speed["forecast"][-1] / speed["present use"][-1],
        },
        stops="the forecast matters when memory is short: preemptions by load "
        + "; ".join(f"{x:g}x: {int(a)} without, {int(b)} with" for x, a, b in zip(loads, lost["present use"], lost["forecast"]))
        + ". " + crossing("Admission by forecast, as throughput,", loads, [a / b for a, b in zip(speed["forecast"], speed["present use"])],
                          "of the load", 0.95),
        panels=[
            Panel("tokens in the KV cache", "share of the run", "tokens", {k: _curve(r) for k, r in runs.items()}),
            Panel("a pool of 30 % of the peak", "load", "preemptions", {k: (loads, v) for k, v in lost.items()}),
            Panel("time to the end", "percentile", "s", {k: ([50, 90, 99], [percentile(r.e2e, q) for q in (50, 90, 99)]) for k, r in runs.items()},
                  logy=True),
        ],
        grids=[Grid("Equal token load", ["arm", "P50 E2E, s", "P99 E2E, s", "P99/P50", "KV range, tokens"], [
            [k, f"{percentile(r.e2e, 50):.1f}", f"{percentile(r.e2e, 99):.1f}", f"{tail[k]:.1f}", f"{swing[k]:.0f}"] for k, r in runs.items()])],
        notes=["Lengths are a law, not a trace: difficulty Beta(3, 2), thinking LogNormal(6.3 + 2.5 d, 0.7) up to 16k, answers LogNormal(5, 0.6). "
               "Llama-3.1-8B on an H100 by roofline.",
               "What a budget does to accuracy is not simulated: the share of requests that wanted to think longer bounds it."],
    )  # fmt: skip


def _reasoning(n: int, short: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Prompts and outputs, and how long each wanted to think."""
    rng = np.random.default_rng(0)
    wanted = np.exp(rng.normal(6.3 + 2.5 * rng.beta(3, 2, n), 0.7)) / short
    said = np.clip(wanted, 32 / short, LONGEST / short) + np.exp(rng.normal(5, 0.6, n)) / short
    return (rng.integers(50, 300, n), np.maximum(1, said).astype(int)), wanted


def _ordinary(n: int, tokens: int, short: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and answers that together say as many tokens."""
    rng = np.random.default_rng(1)
    count = min(int(tokens / 180), 20 * n)
    return rng.integers(50, 300, count), np.clip(np.exp(rng.normal(5, 0.6, count)) / short, 8 / short, 2000).astype(int) + 1


def _curve(r: Result, points: int = 60) -> tuple[list[float], list[float]]:
    """Tokens in the cache over the run."""
    at = np.interp(np.linspace(r.steps["t0"][0], r.steps["t1"][-1], points), r.steps["t1"], r.steps["kv_tokens"])
    return np.linspace(0, 1, points).tolist(), at.tolist()


def _swing(r: Result) -> float:
    """Range of the tokens in the cache in the middle half of the run."""
    _, fill = _curve(r, 200)
    middle = np.array(fill[50:150])
    return float(middle.max() - middle.min())


def _pool(target: Target, tokens: float, longest: int) -> Target:
    """The same device with a pool for ``tokens``, and for the longest request at least."""
    group = target.geometry.groups[0]
    blocks = max(int(tokens / group.block_tokens), longest // group.block_tokens + 8)
    geometry = type(target.geometry)(groups=target.geometry.groups, num_blocks=(blocks,))
    return Target(target.latency, geometry, target.layers, target.max_model_len)


RECIPE = Recipe("Serving reasoning models: swings, stragglers, budgets", "Li et al., ICLR 2026, arXiv 2510.18672", "simulation", CLAIMS, run)
