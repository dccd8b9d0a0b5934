"""NanoFlow: what overlapping nano-batches is worth on the operators of a latency model, and at which size of a step it stops."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, at_rate, steady_rate
from presage.reproduce.speculation import gpu, roofline
from presage.schedule.overlap import LINEAR, Operation, Overlapped, cut_evenly, search
from presage.simulate.latency.roofline import Roofline
from presage.simulate.run import Target

MODEL, CARD, TP = "meta-llama--Meta-Llama-3.1-70B", "a100-80", 8
CONTEXT, PROMPTS = 768, 0.5
SIZES = (256, 512, 1024, 2048, 4096)
CLAIMS = (
    Claim("overlap against sequential", "1.14 to 1.22x (their own engine, no overlap)", "the same operators one by one",
          "Llama-70B on 8 A100, steps of 2048 rows, half of them prompts; searched plan", "1.1x or more", 1.1),
    Claim("cutting alone", "costs 8 to 13 %", "unsplit", "the same cuts without overlap", "0.97x or less", 0.97, 1.0),
    Claim("no benefit of sharing", "the whole gain is that shares are not linear", "searched plan", "speed equal to the share of units",
          "1.0x: no gain is left", 1.01, 1.1),
    Claim("one device", "needs collectives and attention to hide", "8 devices", "Llama-8B on one A100, the same step; gain kept",
          "no more than half of the gain", 0.5, 1.0),
    Claim("throughput in serving", "1.14 to 1.22x", "fcfs, same dense batch", "prompts of 512, outputs of 256 to 768, all at once",
          "1.1x or more", 1.1),
)  # fmt: skip


def run(job: Job) -> Measured:
    """The searched plan by size of a step, its controls, and a served burst."""
    big, small = roofline(job, MODEL, CARD, TP), roofline(job, device=CARD)
    plans = {n: search(_cutter(big, n)) for n in SIZES}
    main = plans[2048]
    one = search(_cutter(small, 2048))
    whole = _cutter(big, 2048)(())
    parts = _cutter(big, 2048)(main.cuts or (0.5,))
    alone = sum(o.seconds for o in whole[0]) / sum(o.seconds for chain in parts for o in chain)
    control = search(_cutter(big, 2048), LINEAR)
    priced = {price: search(lambda cuts, p=price: cut_evenly(whole[0], cuts, p)).gain for price in (0.0, 0.1, 0.2, 0.3)}
    served = _served(job)
    gains = [p.gain for p in plans.values()]
    bound = _bound(whole[0])
    return Measured(
        values={
            "overlap against sequential": main.gain,
            "cutting alone": alone,
            "no benefit of sharing": control.gain,
            "one device": (one.gain - 1) / max(1e-9, main.gain - 1),
            "throughput in serving": served["overlapped"] / served["sequential"],
        },
        stops="by rows of a step: " + ", ".join(f"{g:.2f}x at {n}" for n, g in zip(SIZES, gains))
        + ". Below about 512 rows the engine does not cut at all: weights would be read once per range.",
        panels=[
            Panel("Llama-70B, 8 A100, half prompts", "rows of a step", "gain of the searched plan", {"8 devices": (SIZES, gains), "1 device, 8B": (
                SIZES, [search(_cutter(small, n)).gain for n in SIZES])}, logx=True, level=1.0),
            Panel("price of cutting a GEMM (2048 rows)", "extra cost of GEMMs", "gain", {"even": (list(priced), list(priced.values()))}, level=1.0),
            Panel("a layer of 2048 rows", "", "share of time", {"bound by": (list(bound), list(bound.values()))}, kind="bar"),
        ],
        grids=[Grid("Searched plans", ["rows", "cuts", "units for memory, network", "sequential, us a layer", "overlapped", "gain"], [
            [str(n), ", ".join(f"{c:g}" for c in p.cuts) or "none", f"{p.share['memory']:g}, {p.share['network']:g}", f"{1e6 * p.sequential:.0f}",
             f"{1e6 * p.seconds:.0f}", f"{p.gain:.2f}"] for n, p in plans.items()])],
        notes=["The curves of speed against share of execution units are the paper's measured ones on A100; the operators' times are the roofline's.",
               f"A plan that loses is not taken. Burst: {served['sequential']:.2f} requests/s sequential, {served['overlapped']:.2f} overlapped."],
    )  # fmt: skip


def _cutter(latency: Roofline, rows: int) -> Any:
    """Chains of a step of ``rows`` rows: half prompt chunks of 512, half decoding at ``CONTEXT`` tokens."""
    decode = int(rows * (1 - PROMPTS))
    chunk = rows - decode
    f = np.array([rows, decode + chunk / 512, decode, chunk, 0, decode + chunk / 512, decode * CONTEXT + chunk, decode * CONTEXT + chunk * 512, 1, 0,
                  0, 0], float)  # fmt: skip
    priced = Overlapped(latency, latency.model.layers)
    return lambda cuts: priced.chains(f, cuts)


def _bound(chain: list[Operation]) -> dict[str, float]:
    total = sum(o.seconds for o in chain)
    return {r: sum(o.seconds for o in chain if o.resource == r) / total for r in ("compute", "memory", "network")}


def _served(job: Job) -> dict[str, float]:
    """Requests per second of a burst with and without overlap, the same dense batch."""
    base, n, rng = gpu(job, MODEL, CARD, TP, 4096), job.pick(2400, 900), np.random.default_rng(0)
    sizes = np.full(n, 512), rng.integers(job.pick(256, 40), job.pick(769, 121), n)
    settings = {"max_num_batched_tokens": 2048, "max_num_seqs": 1024, "enable_prefix_caching": False}
    latency: Any = base.latency
    priced = Target(Overlapped(latency, base.layers), base.geometry, base.layers, base.max_model_len)
    found = {}
    for name, policy, target in (("sequential", "fcfs", base), ("overlapped", "splits", priced)):
        found[name] = steady_rate(Arm(policy, settings=settings).run(at_rate(sizes, float("inf")), target, keep=False))
        job.say(f"{name}: {found[name]:.2f} requests/s")
    return found


RECIPE = Recipe("NanoFlow: operations of nano-batches overlapped inside a device", "Zhu et al., arXiv 2408.12757", "simulation", CLAIMS, run)
