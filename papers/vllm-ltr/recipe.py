"""Learning to rank: a ranker trained on recorded prompts, and rankers of known quality, in a burst and at rising load, against FCFS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from presage.bench.arrivals import arrival_times
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, at_rate, percentile, steady_rate, waited
from presage.reproduce.speculation import crossing, gpu
from presage.reproduce.texts import WORKLOADS, recorded
from presage.schedule.ltr import Ltr
from presage.schedule.ltr_train import train
from presage.simulate.run import Result, Target

SETTINGS: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "enable_prefix_caching": False}
NOISE = (0.0, 0.36, 0.62, 1.0, 1.53, 3.0)
DIALS: dict[str, Any] = {"least_tau": -1.0, "patience": 1e6}
CLAIMS = (
    Claim("burst, tau about 0.5", "up to 6.9x lower mean latency in a burst of 2000", "FCFS", "burst, lognormal outputs, 32 at a time; "
          "mean seconds a token", "2.5x lower or better", 2.5),
    Claim("learnt order", "tau 0.52 to 0.64 (OPT-125M, ListMLE)", "no order", "recorded prompts of 6 kinds, held out", "tau 0.5 or more", 0.5,
          0.0, ""),
    Claim("learnt ranker in a burst", "2.8x lower latency for chat", "FCFS", "those prompts with their recorded lengths, at once",
          "1.5x lower or better", 1.5),
    Claim("first half of the results", "6.5x throughput for the first k", "FCFS", "the burst, tau about 0.5; time until half are done",
          "1.5x sooner or better", 1.5),
    Claim("guard against starvation", "longest wait bounded at little cost", "no guard", "sustained overload, tau about 0.5; longest wait",
          "at most 0.7 of it", 0.7, 1.0),
    Claim("light load", "helps only with a queue", "FCFS", "half load, mean seconds a token", "within 1.1x", 1.1, 1.6),
)  # fmt: skip


def run(job: Job) -> Measured:
    """The burst by quality of the ranker, the trained ranker, the guard, and the load sweep."""
    n, rng, target = job.pick(600, 80), np.random.default_rng(0), gpu(job, device="a100-80", max_len=4096)
    sizes = np.clip(rng.lognormal(4.5, 0.6, n), 8, 1500).astype(int), np.clip(rng.lognormal(5, 1, n), 4, 2000).astype(int)
    burst = at_rate(sizes, float("inf"))
    fcfs = Arm(settings=SETTINGS)
    ltr = {s: Arm("ltr", DIALS | {"noise": s}, settings=SETTINGS) for s in NOISE}
    base = fcfs.run(burst, target, keep=False)
    runs = {s: arm.run(burst, target, keep=False) for s, arm in ltr.items()}
    # Log-lengths have deviation 1, so noise gives this correlation, and Gaussians this tau.
    tau = {s: 2 / math.pi * math.asin(1 / math.hypot(1, s)) for s in NOISE}
    gain = {s: _per_token(base) / _per_token(r) for s, r in runs.items()}
    learnt, real = _trained(job, target)
    most = steady_rate(base)
    loads = [0.5, 0.7, 0.85, 1.0, 1.2] if not job.quick else [0.5, 1.2]
    sweep = {name: [_per_token(arm.run(at_rate(sizes, x * most), target, keep=False)) for x in loads]
             for name, arm in (("fcfs", fcfs), ("tau 0.5", ltr[1.0]), ("tau 1", ltr[0.0]))}  # fmt: skip
    ratio = {k: [a / b for a, b in zip(sweep["fcfs"], v)] for k, v in sweep.items() if k != "fcfs"}
    guard = Arm("ltr", {"noise": 1.0, "least_tau": -1.0, "patience": job.pick(20, 3)}, settings=SETTINGS)
    over = at_rate(sizes, 1.2 * most)
    longest = [float(waited(arm.run(over, target, keep=False)).max()) for arm in (guard, ltr[1.0])]
    half = [percentile(r.requests["done"] - r.requests["arrival"].min(), 50) for r in (base, runs[1.0])]
    return Measured(
        values={
            "burst, tau about 0.5": gain[1.0],
            "learnt order": learnt,
            "learnt ranker in a burst": real,
            "first half of the results": half[0] / half[1],
            "guard against starvation": longest[0] / longest[1],
            "light load": ratio["tau 0.5"][0],
        },
        stops=f"it needs a queue: at {100 * loads[0]:.0f} % load the gain at tau 0.5 is {ratio['tau 0.5'][0]:.2f}x, at {100 * loads[-1]:.0f} % "
        f"{ratio['tau 0.5'][-1]:.2f}x; in the burst "
        + crossing("a ranker with noise", [1 + s for s in NOISE], list(gain.values()), "(1 + noise on the log length)", 1.1) + ".",
        panels=[
            Panel("burst", "Kendall tau of the ranker", "mean seconds a token, FCFS against it", {"gain": (list(tau.values()), list(gain.values()))},
                  level=1.0),
            Panel("Poisson arrivals", "share of sustained load", "mean seconds a token, FCFS against it", {k: (loads, v) for k, v in ratio.items()},
                  level=1.0),
        ],
        grids=[Grid(f"Burst of {n}", ["tau", "mean s a token", "gain", "mean latency, s", "P99 latency, s"], [
            ["FCFS", f"{_per_token(base):.3f}", "", f"{base.e2e.mean():.1f}", f"{percentile(base.e2e, 99):.1f}"],
            *[[f"{tau[s]:.2f}", f"{_per_token(r):.3f}", f"{gain[s]:.2f}", f"{r.e2e.mean():.1f}", f"{percentile(r.e2e, 99):.1f}"]
              for s, r in runs.items()]])],
        notes=["Llama-3.1-8B on an A100 by roofline. A ranker of known quality is the log of the true length plus Gaussian noise.",
               "The trained ranker is a linear score over hashed n-grams (ListMLE), microseconds a prompt; the paper's is OPT-125M. Its prompts are "
               "of six kinds of work, which makes the order easier to learn than within one kind."],
    )  # fmt: skip


def _per_token(r: Result) -> float:
    return float((r.e2e / r.requests["n_out"]).mean())


def _trained(job: Job, target: Target) -> tuple[float, float]:
    """Tau on held-out prompts, and the gain over FCFS when those come at once."""
    rows = [one for name in WORKLOADS for one in recorded(job, name, job.pick(240, 40), job.pick(600, 200), 600)]
    order = np.random.default_rng(1).permutation(len(rows))
    learn, test = [rows[i] for i in order[::2]], [rows[i] for i in order[1::2]]
    ranker = train([r.prompt for r in learn], [len(r.output) for r in learn], epochs=job.pick(20, 5))
    work = [
        Request(id=f"r{i}", prompt=r.prompt, sampling=SamplingParams(max_tokens=len(r.output), ignore_eos=True), arrival=t)
        for i, (r, t) in enumerate(zip(test, arrival_times(len(test), float("inf"))))
    ]  # fmt: skip
    mine = Arm(make=lambda config: Ltr(config, ranker=ranker, patience=1e6, least_tau=-1.0), settings=SETTINGS).run(work, target, keep=False)
    return ranker.tau, _per_token(Arm(settings=SETTINGS).run(work, target, keep=False)) / _per_token(mine)


RECIPE = Recipe("Learning to rank: shortest first by a trained order", "Fu et al., NeurIPS 2024, arXiv 2408.15792", "simulation", CLAIMS, run)
