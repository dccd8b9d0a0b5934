"""GenZ: the roofline against measured steps of Llama-2-70B and BLOOM-176B on A100 and H100, and against measured vLLM runs end to end."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from presage.bench.workloads.measured import read_vllm_records
from presage.core.config import EngineConfig
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.simulate.latency.hardware import Hardware, hardware
from presage.simulate.latency.roofline import Roofline, calibrated
from presage.simulate.measured import compare
from presage.simulate.run import Target
from presage.simulate.shape import ModelShape

LLAMA = {"model_type": "llama2-70b", "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
         "intermediate_size": 28672, "vocab_size": 32000}  # fmt: skip
BLOOM = {"model_type": "bloom-176b", "hidden_size": 14336, "num_attention_heads": 112, "num_hidden_layers": 70, "intermediate_size": 57344,
         "vocab_size": 250880}  # fmt: skip
SHAPES = {"llama2-70b": ModelShape.of(LLAMA), "bloom-176b": replace(ModelShape.of(BLOOM), gated=False)}
CARDS = {"a100-80gb": "a100-80", "h100-80gb": "h100"}
CLAIMS = (
    Claim("prefill, calibrated", "2.7 % geometric mean", "measured", "Llama-2-70B, 2 to 8 A100 or H100; every second point fitted, the others judged",
          "median error 10 % or less", 10.0, 40.0, "%"),
    Claim("decode, calibrated", "1.9 % geometric mean", "measured", "the same", "median error 10 % or less", 10.0, 40.0, "%"),
    Claim("calibration matters", "efficiency is fitted per platform", "data sheet alone", "the same, all points", "2x smaller median error or better",
          2.0),
    Claim("unseen shape", "one factor per platform serves all models", "measured", "BLOOM-176B with Llama's efficiencies, 8 devices",
          "median error 20 % or less", 20.0, 60.0, "%"),
    Claim("measured vLLM runs, latency", "others: 5 to 15 %", "measured TTFT, TPOT and E2E means", "Llama-3.1-8B on RTX PRO 6000, data sheet alone",
          "mean error 15 % or less", 15.0, 50.0, "%"),
)  # fmt: skip
Points = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(job: Job) -> Measured:
    """Fit per platform on half of the points, judge on the rest, then carry the efficiencies to another model."""
    rows = _table(job)
    off: dict[str, list[np.ndarray]] = defaultdict(list)
    dots: dict[str, list[Any]] = defaultdict(list)
    lines, by_batch = [], defaultdict(list)
    for (name, card, tp), points in sorted(rows.items()):
        if name != "llama2-70b" or (job.quick and tp != 8):
            continue
        features, seconds, decode = points
        seen = np.zeros(len(seconds), bool)
        for d in (0, 1):
            seen[np.flatnonzero(decode == d)[::2]] = True
        fits = {d: calibrated(SHAPES[name], hardware(CARDS[card]), features[seen & (decode == d)], seconds[seen & (decode == d)], tp) for d in (0, 1)}
        errors = {}
        for d, word in ((0, "prefill"), (1, "decode")):
            mine = decode == d
            left = mine & ~seen
            errors[word] = _errors(fits[d], features[left], seconds[left])
            off[word].append(errors[word])
            off["fitted"].append(_errors(fits[d], features[mine], seconds[mine]))
            off["sheet"].append(_errors(Roofline(SHAPES[name], hardware(CARDS[card]), tp), features[mine], seconds[mine]))
            dots[f"{word}, {CARDS[card]}"].append((seconds[left], fits[d].predict(features[left])[:, 0]))
            for f, e in zip(features[left], errors[word]):
                by_batch[word, int(f[1])].append(100 * e)
        other = rows.get(("bloom-176b", card, tp))
        if other is not None:
            for d in (0, 1):
                mine = other[2] == d
                off["unseen"].append(_errors(_carry(fits[d].hardware, SHAPES["bloom-176b"], tp), other[0][mine], other[1][mine]))
        h = fits[1].hardware
        lines.append([f"{tp} x {CARDS[card]}", f"{fits[0].hardware.compute_eff:.2f}", f"{h.memory_eff:.2f}", f"{1e3 * h.overhead:.1f}",
                      *(f"{100 * np.median(errors[w]):.1f} %" for w in errors)])  # fmt: skip
    found = {k: 100 * float(np.median(np.concatenate(v))) for k, v in off.items()}
    runs = _vllm(job)
    mean = float(np.mean([abs(e["mean"]) for e in runs.values()]))
    batches = sorted({b for _, b in by_batch})
    shown = {w: [float(np.median(by_batch[w, b])) if by_batch[w, b] else float("nan") for b in batches] for w in ("prefill", "decode")}
    return Measured(
        values={
            "prefill, calibrated": found["prefill"],
            "decode, calibrated": found["decode"],
            "calibration matters": found["sheet"] / found["fitted"],
            "unseen shape": found["unseen"],
            "measured vLLM runs, latency": 100 * mean,
        },
        stops="median error on points that were not fitted, by batch: "
        + "; ".join(f"{w} " + ", ".join(f"{e:.0f} % at {b}" for b, e in zip(batches, v) if e == e) for w, v in shown.items())
        + ". One efficiency per platform cannot follow kernels whose efficiency changes with the shape.",
        panels=[
            Panel("Llama-2-70B, points not fitted", "measured, s", "predicted, s", {
                k: (np.concatenate([a for a, _ in v]).tolist(), np.concatenate([b for _, b in v]).tolist()) for k, v in dots.items()},
                kind="scatter", logx=True, logy=True),
            Panel("vLLM runs, Llama-3.1-8B, data sheet alone", "", "simulated over measured - 1, %",
                  {k: (list(runs), [100 * e[k] for e in runs.values()]) for k in ("mean", "median", "p99")}, kind="bar"),
        ],
        grids=[Grid("By platform", ["devices", "compute efficiency", "memory efficiency", "overhead, ms", "prefill error", "decode error"], lines)],
        notes=["Steps: Splitwise's table (medians of 5). End to end: a vLLM 0.19 run of 300 ShareGPT requests, replayed by arrival and length.",
               f"Data sheet without calibration: median error {found['sheet']:.0f} % where the fitted model has {found['fitted']:.1f} %."],
    )  # fmt: skip


def _table(job: Job) -> dict[tuple[str, str, int], Points]:
    """Features, seconds and kind (1 = decode) of measured steps by model, device and count."""
    told: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    with open(job.data("perf_splitwise/perf_model.csv"), newline="") as file:
        for r in csv.DictReader(file):
            if r["hardware"] in CARDS:
                sizes = int(r["prompt_size"]), int(r["batch_size"]), int(r["token_size"])
                told[r["model"], r["hardware"], int(r["tensor_parallel"]), *sizes].append((float(r["prompt_time"]), float(r["token_time"])))
    out: dict[Any, list[tuple[list[float], float, int]]] = defaultdict(list)
    for (model, card, tp, n, b, said), times in told.items():
        first, each = np.median(np.array(times), 0) / 1e3
        if said == 128:
            out[model, card, tp].append(([n * b, b, 0, n * b, 0, b, n * b, n * b * n, 1, 0, 0, 0], first, 0))
        context = n + said / 2
        out[model, card, tp].append(([b, b, b, 0, 0, b, b * context, b * context, 1, 0, 0, 0], each, 1))
    return {k: (np.array([p[0] for p in v], float), np.array([p[1] for p in v]), np.array([p[2] for p in v])) for k, v in out.items()}


def _errors(model: Roofline, features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    return np.abs(model.predict(features)[:, 0] / seconds - 1)


def _carry(fitted: Hardware, shape: ModelShape, tp: int) -> Roofline:
    return Roofline(shape, fitted, tp)


def _vllm(job: Job) -> dict[str, dict[str, float]]:
    """The measured vLLM run, simulated from the data sheet."""
    device, config = hardware("rtxpro6000"), EngineConfig.of(max_num_batched_tokens=2048, max_num_seqs=128, enable_prefix_caching=False)
    model = ModelShape.of(job.data("model_configs/meta-llama--Meta-Llama-3.1-8B_config.json"))
    geometry = model.geometry(device.memory, max_num_batched_tokens=2048, max_model_len=16384)
    real = read_vllm_records(job.data("."), "llama")
    return compare(real, config, Target(Roofline(model, device), geometry, model.layers, 16384))


RECIPE = Recipe("GenZ: a step as a sum of operators, each at its roofline", "Bambhaniya et al., arXiv 2406.01698", "simulation", CLAIMS, run)
