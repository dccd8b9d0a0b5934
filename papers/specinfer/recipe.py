"""SpecInfer: the bundled pair drafts chains and trees for real; acceptance rules are compared on its own distributions; load by roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.bundled import bundled_path
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.speculation import crossing, roofline, verify_seconds
from presage.reproduce.texts import jsonl

DEPTH = 5
MODEL: dict[str, Any] = {"method": "model", "model": str(bundled_path("presage-tiny-draft"))}
CHAIN = MODEL | {"num_speculative_tokens": DEPTH}
SHAPES: dict[str, dict[str, Any]] = {
    "chain": CHAIN,
    "tree, width 2": MODEL | {"num_speculative_tokens": 10, "tree_width": 2, "tree_depth": DEPTH},
    "tree, width 3": MODEL | {"num_speculative_tokens": 20, "tree_width": 3, "tree_depth": DEPTH},
    "suffix alone": {"method": "suffix", "num_speculative_tokens": 16},
    "suffix and model merged": {"method": "hybrid", "num_speculative_tokens": 16, "drafters": ["suffix", CHAIN]},
}
WIDTH = {"chain": 1, "tree, width 2": 2, "tree, width 3": 3}
CLAIMS = (
    Claim("tree against chain, greedy", "1.2 to 1.5x fewer steps", "chain of the same depth", "SQL and code prompts, bundled pair",
          "1.15x or more tokens a step", 1.15),
    Claim("tree against chain, sampled", "1.3 to 1.4x fewer steps", "chain, multi-step rule", "the same at temperature 1",
          "1.15x or more tokens a step", 1.15),
    Claim("merged drafters", "several drafters merged cover more", "the better one of them alone", "the same, greedy",
          "1.05x or more tokens a step", 1.05),
    Claim("multi-step against naive sampling", "1.2 to 1.3x, never worse", "sample the target, look it up in the tree",
          "3 sampled children on the pair's own distributions", "1.1x or more accepted", 1.1),
    Claim("speed at batch 1", "1.5 to 2.5x", "plain decoding", "acceptance of the pair; LLaMA-7B-like target, 68M draft on an A10 by roofline",
          "1.5x or more for the tree", 1.5),
    Claim("wide trees stop at small batches", "widths above 3 stop paying at batch 4", "chain", "the same, batch where the chain overtakes",
          "16 or less", 16.0, 64.0, "requests"),
)  # fmt: skip


@dataclass
class Run:
    """Figures of one engine: tokens a step of a decoding request, nodes drafted a step, accepted share of steps by position."""

    tokens: float
    nodes: float
    position: list[float]


def run(job: Job) -> Measured:
    """Real generation by shape, then rules by enumeration, then load."""
    texts = _prompts(job, job.pick(48, 6))
    greedy = {name: _generate(job, name, texts, 0.0, "keyed") for name in SHAPES}
    sampled = {name: _generate(job, name, texts, 1.0, "multi_step") for name in ("chain", "tree, width 3")}
    multi, naive = _rules(texts[: job.pick(24, 4)])
    loads = [1, 2, 4, 8, 16, 32, 64, 128]
    speeds = {name: _speeds(job, greedy[name], WIDTH[name], loads) for name in WIDTH}
    tree, chain = speeds["tree, width 3"], speeds["chain"]
    ahead = [a / b for a, b in zip(tree, chain)]
    return Measured(
        values={
            "tree against chain, greedy": greedy["tree, width 3"].tokens / greedy["chain"].tokens,
            "tree against chain, sampled": sampled["tree, width 3"].tokens / sampled["chain"].tokens,
            "merged drafters": greedy["suffix and model merged"].tokens / max(greedy["suffix alone"].tokens, greedy["chain"].tokens),
            "multi-step against naive sampling": multi / naive,
            "speed at batch 1": tree[0],
            "wide trees stop at small batches": float(next((b for b, r in zip(loads, ahead) if r <= 1), 2 * loads[-1])),
        },
        stops=f"{crossing('the tree of width 3', loads, tree)}; {crossing('the chain', loads, chain)}; against the chain, "
        + crossing("the tree", loads, ahead) + ".",
        panels=[
            Panel("accepted by position, greedy", "place in the draft", "share of steps",
                  {n: (list(range(1, len(r.position) + 1)), r.position) for n, r in greedy.items()}),
            Panel("Llama-3.1-8B, A10 (roofline)", "concurrent requests", "tokens/s against plain decoding",
                  {n: (loads, v) for n, v in speeds.items()}, logx=True, level=1.0),
        ],
        grids=[Grid("Tokens a step", ["shape", "greedy", "nodes a step", "temperature 1, multi-step"], [
            [n, f"{r.tokens:.2f}", f"{r.nodes:.1f}", f"{sampled[n].tokens:.2f}" if n in sampled else ""] for n, r in greedy.items()])],
        notes=[
            "Trees here take the likeliest nodes under their budget instead of the paper's fixed widths by level.",
            f"An accepted draft token of three sampled children: multi-step {multi:.3f}, naive {naive:.3f}, computed exactly from both models' "
            "distributions, children drawn independently.",
            "The draft model is 1/8 of the target here and 1/100 in the paper; the load figure charges the paper's 68M draft, one pass a level.",
        ],
    )  # fmt: skip


def _prompts(job: Job, count: int) -> list[str]:
    sql = [f"Question: {r['question']}\nSQL: SELECT" for r in jsonl(job.data("spider_dev/dev.jsonl"))][:: 31]
    code = [r["prompt"] for r in jsonl(next(job.data("humaneval").glob("*.jsonl")))][::5]
    return [text for pair in zip(sql, code) for text in pair][:count]


def _generate(job: Job, name: str, texts: list[str], temperature: float, rule: str) -> Run:
    """Real generation with verification of every draft."""
    from presage import LLM, SamplingParams

    spec = SHAPES[name] | {"length": {"policy": "fixed", "num_speculative_tokens": 64}, "rule": rule}
    llm = LLM("presage-tiny", speculative_config=spec, kv_cache_memory="64MiB", max_num_seqs=8, max_model_len=768)
    out = llm.generate(texts, [SamplingParams(temperature=temperature, seed=i, max_tokens=64, ignore_eos=True) for i in range(len(texts))])
    stats = llm.stats()
    llm.close()
    tokens = sum(len(o.outputs[0].token_ids) for o in out)
    # Every decoding step of a request gives one token that nobody drafted; each prompt gives one more.
    steps = tokens - len(texts) - stats["spec_num_accepted_tokens"]
    job.say(f"{name}, temperature {temperature:g}: {1 + stats['spec_num_accepted_tokens'] / steps:.2f} tokens a step")
    places = [n / steps for n in stats["spec_num_accepted_tokens_per_pos"]]
    return Run(1 + stats["spec_num_accepted_tokens"] / steps, stats["spec_num_draft_tokens"] / steps, places)


def _rules(texts: list[str], children: int = 3) -> tuple[float, float]:
    """Chance that one of the children, drawn independently from the draft model, is accepted: multi-step, and naive sampling."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    target, draft = (AutoModelForCausalLM.from_pretrained(bundled_path(n)).eval() for n in ("presage-tiny", "presage-tiny-draft"))
    encode = AutoTokenizer.from_pretrained(bundled_path("presage-tiny"))
    multi, naive = [], []
    for text in texts:
        ids = torch.tensor([encode(text).input_ids[:256]])
        with torch.no_grad():
            p, q = (torch.softmax(m(ids).logits[0].double(), -1).numpy() for m in (target, draft))
        naive.append(1 - (p * (1 - q) ** children).sum(-1))
        lost = np.ones(len(p))
        for _ in range(children):
            lost *= 1 - np.minimum(p, q).sum(-1)
            p = np.maximum(p - q, 0)
            p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
        multi.append(1 - lost)
    return float(np.concatenate(multi).mean()), float(np.concatenate(naive).mean())


def _speeds(job: Job, found: Run, width: int, loads: list[int], context: int = 400) -> list[float]:
    """Tokens per second against plain decoding: a pass of the draft model per level, then verification."""
    target = roofline(job, device="a10g")
    out = []
    for batch in loads:
        plain = verify_seconds(target, batch, 0, context)
        # 68M weights of 2 bytes at 600 GB/s, or their operations at the card's peak, and the launches of two layers.
        level = max(136e6 / 510e9, 2 * 68e6 * batch * width / 49e12) + 1e-4
        out.append(found.tokens * plain / (verify_seconds(target, batch, found.nodes, context) + DEPTH * level))
    return out


RECIPE = Recipe(
    "SpecInfer: token trees verified in one pass", "Miao et al., ASPLOS 2024, arXiv 2305.09781", "tiny cpu", CLAIMS, run
)  # fmt: skip
