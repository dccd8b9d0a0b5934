"""Prepacking: what padded, sorted, packed and ragged prompts cost, by counts and by roofline; and that the engine's own rows are ragged."""

from __future__ import annotations

import numpy as np

from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.serving import Arm, at_rate
from presage.reproduce.speculation import gpu, roofline
from presage.schedule.prepacking import LAYOUTS, layouts, prefill_seconds

BATCHES = (1, 4, 16, 64)
LAWS = {"lognormal(4.5, 0.9)": (4.5, 0.9), "lognormal(4.0, 0.7)": (4.0, 0.7)}
CLAIMS = (
    Claim("against padding", "5.2x (0.441 against 2.299 s, MMLU, batch 64)", "padded batch", "lognormal prompts, batch 64; Llama-3.1-8B on an A100 "
          "by roofline", "2x faster prefill or better", 2.0),
    Claim("against sorted batches", "1.5x (0.441 against 0.658 s)", "batches sorted by length", "the same, batch 16 out of 4096",
          "1.1x or more", 1.1),
    Claim("equal lengths", "nothing to win", "padded batch", "prompts of 480 to 512 tokens", "within 5 %", 1.05, 1.3),
    Claim("ragged rows", "not in the paper", "prepacked", "lognormal prompts, batch 64", "never slower", 1.0, 0.9),
    Claim("the engine computes no pads", "not in the paper", "sum of the prompts", "the same prompts through the engine's loop",
          "1 row computed a prompt token", 1.0, 1.2, "rows"),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Counts and seconds by layout and batch; then the rows that the engine's own plans have."""
    rng, latency = np.random.default_rng(0), roofline(job, device="a100-80")
    n = job.pick(4096, 256)
    laws = {name: np.clip(rng.lognormal(a, b, n), 1, 2048).astype(int).tolist() for name, (a, b) in LAWS.items()}
    laws["uniform 480 to 512"] = rng.integers(480, 513, n).tolist()
    seconds = {(law, kind, b): prefill_seconds(latency, ls, kind, b) for law, ls in laws.items() for kind in LAYOUTS for b in BATCHES}
    main, flat = "lognormal(4.5, 0.9)", "uniform 480 to 512"
    ratio = [seconds[main, "padded", b] / seconds[main, "prepacked", b] for b in BATCHES]
    free = [seconds[main, "ragged", b] / seconds[main, "prepacked", b] for b in BATCHES]
    target, prompts = gpu(job, device="a100-80", max_len=4096), np.array(laws[main][: job.pick(1024, 128)])
    settings = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "enable_prefix_caching": False}
    done = Arm(settings=settings).run(at_rate((prompts, np.ones(len(prompts), int)), float("inf")), target, keep=False)
    rows = float((done.steps["rows"] * done.steps["repeat"]).sum() / prompts.sum())
    return Measured(
        values={
            "against padding": ratio[-1],
            "against sorted batches": seconds[main, "sorted", 16] / seconds[main, "prepacked", 16],
            "equal lengths": seconds[flat, "padded", 64] / seconds[flat, "prepacked", 64],
            "ragged rows": seconds[main, "prepacked", 64] / seconds[main, "ragged", 64],
            "the engine computes no pads": rows,
        },
        stops="against padding it pays from batch 4 on (" + ", ".join(f"{r:.2f}x at {b}" for b, r in zip(BATCHES, ratio)) + ") and not for equal "
        "lengths; against ragged rows it never does ("
        + ", ".join(f"{r:.2f}x at {b}" for b, r in zip(BATCHES, free)) + ").",
        panels=[
            Panel("prefill, lognormal(4.5, 0.9)", "prompts a batch", "seconds against ragged", {
                kind: (BATCHES, [seconds[main, kind, b] / seconds[main, "ragged", b] for b in BATCHES]) for kind in LAYOUTS}, logx=True),
            Panel("token slots, batch 64", "", "slots a token", {kind: (list(laws), [_slots(ls, kind) for ls in laws.values()]) for kind in LAYOUTS},
                  kind="bar"),
        ],
        grids=[Grid("Batch 64: token slots a token, attention cells against ragged", ["prompts", *LAYOUTS], [
            [law, *(f"{_slots(ls, k):.2f}, {_cells(ls, k):.2f}" for k in LAYOUTS)] for law, ls in laws.items()])],
        notes=["The engine's rows are ragged: nothing is padded, so there is nothing to pack. The technique is worth what the first row says to an "
               "engine that insists on rectangles."],
    )  # fmt: skip


def _slots(lengths: list[int], kind: str, batch: int = 64) -> float:
    return sum(p.slots for p in layouts(lengths, kind, batch)) / sum(lengths)


def _cells(lengths: list[int], kind: str, batch: int = 64) -> float:
    return sum(p.cells for p in layouts(lengths, kind, batch)) / sum(l * l for l in lengths)


RECIPE = Recipe("Prepacking: several prompts in one row", "Zhao et al., 2024, arXiv 2404.09529", "simulation", CLAIMS, run)
