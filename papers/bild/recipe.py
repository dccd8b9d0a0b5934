"""BiLD: the bundled pair with the lossy rule ``bild`` over a grid of its two thresholds, against exact speculation with the same drafts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.bundled import bundled_path
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.speculation import crossing, roofline, verify_seconds
from presage.reproduce.texts import jsonl

STEPS = 10
DRAFT: dict[str, Any] = {"method": "model", "model": str(bundled_path("presage-tiny-draft")), "num_speculative_tokens": STEPS, "min_prob": 0.05}
NEVER = 1e9
CLAIMS = (
    Claim("identity point", "fallback threshold 1 is the large model alone", "large model alone", "school problems and SQL, greedy, 64 tokens",
          "all outputs equal", 1.0, 0.9),
    Claim("large passes a token", "0.2 to 0.5", "1: the large model alone", "the same, thresholds 0.6 and 5", "0.5 or fewer", 0.5, 1.0, ""),
    Claim("against exact speculation", "must need fewer passes", "exact rule, same drafts", "the same, thresholds 0.6 and 5",
          "1.1x fewer large passes or better", 1.1),
    Claim("speed at little loss", "1.4 to 1.85x at the large model's quality", "plain decoding",
          "fastest setting within 5 % of its perplexity; LLaMA-7B-like target, 68M draft on an A10 by roofline", "1.4x or more", 1.4),
    Claim("rollback protects quality", "without rollback quality drops", "rollback at 2 nats", "perplexity under the large model, fallback 0.3",
          "1.1x or more perplexity without rollback", 1.1),
    Claim("rollback point against exact", "speed without loss", "exact speculation, same drafts", "the setting of `speed at little loss`",
          "1.05x or more speed", 1.05),
)  # fmt: skip


@dataclass
class Run:
    """One setting: large passes a token, nodes a step, perplexity under the large model, likeness to its own output, acceptance by place."""

    passes: float
    nodes: float
    perplexity: float
    likeness: float
    position: list[float]
    outputs: list[list[int]]


def run(job: Job) -> Measured:
    """The grid, then modelled speed by load."""
    texts = _prompts(job, job.pick(48, 8))
    plain = _generate(texts, None, [])
    exact = _generate(texts, "keyed", plain.outputs)
    settings = [(f, r) for f in (0.3, 0.6, 0.9) for r in (1.0, 2.0, 5.0, 8.0)] if not job.quick else [(0.6, 5.0), (0.3, 2.0)]
    found = {}
    for f, r in [*settings, (0.3, NEVER), (1.0, 5.0)]:
        found[f, r] = _generate(texts, f"bild:fallback_threshold={f},rollback_threshold={r}", plain.outputs)
        job.say(f"fallback {f}, rollback {r:g}: {found[f, r].passes:.2f} passes a token, perplexity {found[f, r].perplexity:.2f}")
    loads = [1, 2, 4, 8, 16, 32, 64]
    good = [k for k in settings if found[k].perplexity <= 1.05 * plain.perplexity] or [max(settings)]
    best = max(good, key=lambda k: _speeds(job, found[k], loads[:1])[0])
    lines = {f"bild {best[0]}, {best[1]:g}": found[best], "bild 0.6, 5": found[0.6, 5.0], "exact": exact}
    speeds = {n: _speeds(job, r, loads) for n, r in lines.items()}
    same = [a == b for a, b in zip(found[1.0, 5.0].outputs, plain.outputs, strict=True)]
    mine = next(iter(speeds.values()))
    return Measured(
        values={
            "identity point": float(np.mean(same)),
            "large passes a token": found[0.6, 5.0].passes,
            "against exact speculation": exact.passes / found[0.6, 5.0].passes,
            "speed at little loss": mine[0],
            "rollback protects quality": found[0.3, NEVER].perplexity / found[0.3, 2.0].perplexity,
            "rollback point against exact": mine[0] / speeds["exact"][0],
        },
        stops="; ".join(crossing(n, loads, v) for n, v in speeds.items()),
        panels=[
            Panel("accepted by position", "place in the draft", "share of steps",
                  {n: (list(range(1, len(r.position) + 1)), r.position) for n, r in lines.items()}),
            Panel("quality against passes", "large passes a token", "perplexity under the large model", {
                "bild": ([found[k].passes for k in settings], [found[k].perplexity for k in settings]),
                "exact": ([exact.passes], [exact.perplexity])}, kind="scatter", level=plain.perplexity),
            Panel("Llama-3.1-8B, A10 (roofline)", "concurrent requests", "tokens/s against plain decoding",
                  {n: (loads, v) for n, v in speeds.items()}, logx=True, level=1.0),
        ],
        grids=[Grid("By thresholds", ["fallback", "rollback", "passes a token", "perplexity", "likeness to the large model's output"], [
            *[[f"{f}", "never" if r == NEVER else f"{r:g}", *_cells(found[f, r])] for f, r in found], ["exact rule", "", *_cells(exact)],
            ["no drafts", "", *_cells(plain)]])],
        notes=[
            "Perplexity of the output under the large model, which alone would take its likeliest token: lower is nearer to it. Likeness is the "
            "longest common subsequence with its own output, as a share of the length (ROUGE-L).",
            "The engine judges drafts before anybody sees them; the draft model stops where a path falls below a chance of 5 %.",
        ],
    )  # fmt: skip


def _cells(r: Run) -> list[str]:
    return [f"{r.passes:.2f}", f"{r.perplexity:.3f}", f"{r.likeness:.2f}"]


def _prompts(job: Job, count: int) -> list[str]:
    sql = [f"Question: {r['question']}\nSQL: SELECT" for r in jsonl(job.data("spider_dev/dev.jsonl"))][::17]
    talk = [f"{t['question']}\n" for t in jsonl(job.data("gsm8k/test.jsonl"))][::13]
    return [text for pair in zip(talk, sql) for text in pair][:count]


def _generate(texts: list[str], rule: str | None, reference: list[list[int]]) -> Run:
    from presage import LLM, SamplingParams

    spec = None if rule is None else DRAFT | {"length": {"policy": "fixed", "num_speculative_tokens": STEPS}, "rule": rule}
    llm = LLM("presage-tiny", speculative_config=spec, kv_cache_memory="64MiB", max_num_seqs=8, max_model_len=768)
    out = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=1))
    stats = llm.stats()
    llm.close()
    ids = [list(o.outputs[0].token_ids) for o in out]
    told = [step[i].logprob for o in out for i, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)]
    tokens = sum(map(len, ids)) - len(ids)
    steps = tokens - stats.get("spec_num_accepted_tokens", 0)
    places = [n / steps for n in stats.get("spec_num_accepted_tokens_per_pos", [])]
    likeness = [_common(a, b) / len(b) for a, b in zip(ids, reference)] or [1.0]
    perplexity = math.exp(-float(np.mean(told)))
    return Run(steps / tokens, stats.get("spec_num_draft_tokens", 0) / steps, perplexity, float(np.mean(likeness)), places, ids)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _speeds(job: Job, r: Run, loads: list[int], context: int = 400) -> list[float]:
    """Tokens per second against plain decoding: a pass of a 68M draft model per drafted token, then one large pass."""
    target, out = roofline(job, device="a10g"), []
    for batch in loads:
        level = max(136e6 / 510e9, 2 * 68e6 * batch / 49e12) + 1e-4
        seconds = verify_seconds(target, batch, r.nodes, context) + r.nodes * level
        out.append(verify_seconds(target, batch, 0, context) / (r.passes * seconds))
    return out


RECIPE = Recipe("BiLD: a small model writes, the large one steps in", "Kim et al., NeurIPS 2023, arXiv 2302.07863", "tiny cpu", CLAIMS, run)
