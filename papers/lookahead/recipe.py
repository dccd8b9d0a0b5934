"""Lookahead (Ant Group's trie, not Jacobi decoding): one branch or many, cold or warm, on recorded answers; load by roofline."""

from __future__ import annotations

from typing import Any

from presage.bench.draft import Recording, Replay, learn, replay
from presage.draft.registry import make_drafter
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.speculation import LOOKUP, by_position, crossing, mean_of, roofline, verify_seconds
from presage.reproduce.texts import recorded, split

SIZE = 32
TRIE: dict[str, Any] = {"decoding_length": SIZE, "branch_length": 12}
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hierarchical": ("lookahead", TRIE),
    "one branch": ("lookahead", TRIE | {"tree": False}),
    "prompt lookup": ("ngram", {"num_speculative_tokens": 12, "prompt_lookup_min": 2, "prompt_lookup_max": 3}),
    "suffix, trees": ("suffix", {"num_speculative_tokens": SIZE, "suffix_decoding_tree": True, "suffix_decoding_max_spec_factor": 4.0}),
}
WORKLOADS = ("tau-bench", "agent", "sql", "maths")
CLAIMS = (
    Claim("tokens a step", "2.1 to 2.7x (Dolly, GSM8K), 5.4x (private RAG)", "plain decoding", "recorded answers, warm trie, 32 nodes",
          "1.8 or more", 1.8),
    Claim("many branches", "hierarchical beats one branch", "one branch out of the same trie", "the same", "1.1x or more", 1.1),
    Claim("warm trie", "needs thousands of past answers", "cold trie", "the same", "1.2x or more", 1.2),
    Claim("against prompt lookup", "better than lookup of the prompt alone", "prompt lookup, 12 tokens", "the same", "1.2x or more", 1.2),
    Claim("more past, more tokens", "acceptance grows with stored answers", "16 stored answers", "SQL, 512 stored answers", "1.2x or more", 1.2),
    Claim("speed at batch 1", "2.0 to 2.7x on an A100", "plain decoding", "maths answers; Llama-3.1-8B on an A100 by roofline", "1.3x or more", 1.3),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Replays, warm and cold, then growth with what is stored, then load."""
    found: dict[str, dict[str, Replay]] = {}
    for name in WORKLOADS:
        past, now = split(recorded(job, name, job.pick(400, 40), job.pick(1500, 300), job.pick(400, 80)), job.pick(200, 28))
        found[name] = {label: _replay(label, past, now) for label in DRAFTERS} | {"hierarchical, cold": _replay("hierarchical", [], now)}
        job.say(f"{name}: {_tokens(found[name]['hierarchical']):.2f} tokens a step")
    mean = {label: mean_of([_tokens(found[n][label]) for n in WORKLOADS]) for label in found["sql"]}
    rows = recorded(job, "sql", job.pick(700, 60))
    stored = [0, 16, 64, 256, 512] if not job.quick else [0, 8, 32]
    growth = [_tokens(_replay("hierarchical", rows[:n], rows[-job.pick(180, 24) :])) for n in stored]
    loads = [1, 2, 4, 8, 16, 32, 64]
    speeds = {f"{n}, {d}": _speeds(job, found[n][d], loads) for n in ("tau-bench", "maths") for d in ("hierarchical", "one branch")}
    return Measured(
        values={
            "tokens a step": mean["hierarchical"],
            "many branches": mean["hierarchical"] / mean["one branch"],
            "warm trie": mean["hierarchical"] / mean["hierarchical, cold"],
            "against prompt lookup": mean["hierarchical"] / mean["prompt lookup"],
            "more past, more tokens": growth[-1] / growth[1],
            "speed at batch 1": speeds["maths, hierarchical"][0],
        },
        stops="; ".join(crossing(n, loads, v) for n, v in speeds.items()),
        panels=[
            Panel("accepted by position", "place in the draft", "share of steps",
                  {f"{n}, {d}": by_position(found[n][d], 12) for n in ("tau-bench", "maths") for d in ("hierarchical", "one branch")}),
            Panel("Llama-3.1-8B, A100 (roofline)", "concurrent requests", "tokens/s against plain decoding",
                  {n: (loads, v) for n, v in speeds.items()}, logx=True, level=1.0),
            Panel("what is stored (SQL)", "past answers", "tokens a step", {"hierarchical": (stored, growth)}),
        ],
        grids=[Grid("Tokens a step (nodes a step)", ["workload", *found["sql"]], [
            [n, *(f"{_tokens(o):.2f} ({o.figures()['drafted_per_step']:.1f})" for o in by.values())] for n, by in found.items()])],
        notes=[
            "The paper divides the node budget by the batch size; here every request keeps its 32 nodes, so the load figure is the trie alone.",
            "A fixed budget is spent on hopeless matches too; the `marginal` length policy (see `suffix-decoding`) is the cure.",
        ],
    )  # fmt: skip


def _replay(label: str, past: list[Recording], now: list[Recording]) -> Replay:
    method, settings = DRAFTERS[label]
    drafter: Any = make_drafter(method, settings)
    learn(drafter, past)
    return replay(drafter, now, name=label, concurrency=4, cap=SIZE)


def _tokens(out: Replay) -> float:
    return out.figures()["tokens_per_step"]


def _speeds(job: Job, out: Replay, loads: list[int], context: int = 1000) -> list[float]:
    latency, nodes = roofline(job, device="a100-80"), out.figures()["drafted_per_step"]
    return [
        _tokens(out) * verify_seconds(latency, b, 0, context) / (verify_seconds(latency, b, nodes, context) + LOOKUP * b)
        for b in loads
    ]


RECIPE = Recipe(
    "Lookahead: many branches out of a trie of past answers", "Zhao et al., KDD 2024, arXiv 2312.12728", "simulation", CLAIMS, run
)  # fmt: skip
