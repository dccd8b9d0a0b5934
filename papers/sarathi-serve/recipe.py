"""Sarathi-Serve: chunks beside decoding rows under a budget from the objective, against whole prompts first and whole prompts beside decodes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, PrefillFirst, at_rate, capacity, gaps, lengths, percentile, waited
from presage.reproduce.speculation import gpu, verify_seconds
from presage.simulate.run import Target

WHOLE: dict[str, Any] = {"max_num_batched_tokens": 8192, "max_num_seqs": 128, "enable_chunked_prefill": False, "enable_prefix_caching": False}
CHUNKS: dict[str, Any] = WHOLE | {"max_num_batched_tokens": 2048, "enable_chunked_prefill": True}
TABLES = ("sharegpt", "arxiv")
CLAIMS = (
    Claim("capacity, ShareGPT", "2.6x vLLM (Mistral-7B, one A100)", "whole prompts first", "P99 TBT within 5 D, median delay within 2 s",
          "1.5x the rate or more", 1.5),
    Claim("capacity, arXiv", "up to 2.6x", "whole prompts first", "the same", "1.5x the rate or more", 1.5),
    Claim("stalls", "generation stalls of seconds vanish", "whole prompts first", "P99 TBT, arXiv at 70 % of the rate at which whole prompts queue",
          "4x lower or better", 4.0),
    Claim("against naive hybrid batches", "TBT up to 28x over decode-only", "whole prompts beside decodes", "the same, P99 TBT", "2x lower or better",
          2.0),
    Claim("first token", "chunks delay it a little (0.53 to 0.76 s)", "whole prompts first", "the same, median TTFT", "at most 1.5x", 1.5, 3.0),
    Claim("light load", "the paper promises nothing here", "whole prompts first", "arXiv at 20 %, median latency",
          "no worse than 1.1x", 1.1, 1.5),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Capacity by bisection, then one load in detail, then a sweep."""
    target = gpu(job, device="a100-80", max_len=8192)
    slo = 5 * verify_seconds(target.latency, 32, 0, 4096)
    arms = {
        "whole prompts first": Arm(make=PrefillFirst, settings=WHOLE),
        "whole prompts beside decodes": Arm(settings=WHOLE),
        "sarathi": Arm("sarathi", {"tbt": slo}, settings=CHUNKS),
        "fcfs, fixed budget 512": Arm(settings=CHUNKS | {"max_num_batched_tokens": 512}),
    }
    n, best, old, new = job.pick(300, 20), {}, "whole prompts first", "sarathi"
    sizes = {t: lengths(job, t, n) for t in TABLES}
    for table in TABLES:
        for name, arm in arms.items():
            best[table, name] = capacity(partial(_holds, arm, sizes[table], target, slo), 1.0, job.pick(10, 80) / 100)
            job.say(f"{table}, {name}: {best[table, name]:.2f} requests/s within {1e3 * slo:.0f} ms")
    # Where requests begin to queue, whatever happens to those who stream.
    most = capacity(lambda rate: bool(np.median(waited(arms[old].run(at_rate(sizes["arxiv"], rate), target, keep=False))) < 0.5), 2.0, 0.1)
    shares = [0.2, 0.35, 0.5, 0.7, 0.85] if not job.quick else [0.2, 0.7]
    found = {name: [arm.run(at_rate(sizes["arxiv"], s * most), target) for s in shares] for name, arm in arms.items()}
    tail = {name: [1e3 * percentile(gaps(r), 99) for r in runs] for name, runs in found.items()}
    first = {name: [percentile(r.ttft, 50) for r in runs] for name, runs in found.items()}
    at = shares.index(0.7)
    longest = {name: [1e3 * gaps(r).max() for r in runs] for name, runs in found.items()}
    latency = [percentile(found[n_][0].e2e, 50) for n_ in (new, old)]
    return Measured(
        values={
            "capacity, ShareGPT": best["sharegpt", new] / best["sharegpt", old],
            "capacity, arXiv": best["arxiv", new] / best["arxiv", old],
            "stalls": tail[old][at] / tail[new][at],
            "against naive hybrid batches": tail["whole prompts beside decodes"][at] / tail[new][at],
            "first token": first[new][at] / first[old][at],
            "light load": latency[0] / latency[1],
        },
        stops="against whole prompts first, by share of the rate at which those begin to queue: "
        + "; ".join(f"at {100 * s:.0f} % P99 TBT {a / b:.2f}x, longest gap {c / d:.2f}x lower, median TTFT {e / f:.2f}x" for s, a, b, c, d, e, f
                    in zip(shares, tail[old], tail[new], longest[old], longest[new], first[new], first[old]))
        + ". Where stalls are rare (fewer than one gap in a hundred), P99 does not see them: only the longest gap falls then.",
        panels=[
            Panel("time between tokens, arXiv", "share of that load", "P99, ms", {k: (shares, v) for k, v in tail.items()}, logy=True,
                  level=1e3 * slo),
            Panel("time to first token, arXiv", "share of that load", "median, s", {k: (shares, v) for k, v in first.items()}),
            Panel("capacity at the strict objective", "", "requests/s",
                  {name: (list(TABLES), [best[t, name] for t in TABLES]) for name in arms}, kind="bar"),
        ],
        grids=[Grid(f"arXiv at 70 % of the {most:.2f} requests/s at which whole prompts begin to queue", [
            "policy", "P99 TBT, ms", "largest gap, ms", "median TTFT, s", "tokens/s"], [
            [k, f"{tail[k][at]:.0f}", f"{longest[k][at]:.0f}", f"{first[k][at]:.2f}",
             f"{r[at].requests['n_out'].sum() / r[at].duration:.0f}"] for k, r in found.items()])],
        notes=[
            f"Llama-3.1-8B on one A100 by roofline. The objective 5 D is {1e3 * slo:.0f} ms: five times a decoding step of 32 requests with 4k "
            "tokens of context, as in the paper.",
            "Whole prompts first and whole prompts beside decodes run in the same loop with the same cache; only the plan differs.",
        ],
    )  # fmt: skip


def _holds(arm: Arm, sizes: tuple[np.ndarray, np.ndarray], target: Target, slo: float, rate: float) -> bool:
    r = arm.run(at_rate(sizes, rate), target)
    return bool(percentile(gaps(r), 99) <= slo and np.median(waited(r)) <= 2.0)


RECIPE = Recipe("Sarathi-Serve: stall-free batches of chunks", "Agrawal et al., OSDI 2024, arXiv 2403.02310", "simulation", CLAIMS, run)
