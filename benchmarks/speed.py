"""What pipelined drafting (SPEED) gives: train a small decoder whose layers are shared cyclically, then draft with it three ways.

    python benchmarks/speed.py OUT [--seconds 240] [--block 2] [--passes 4] [--max-tokens 96] [--threads 1]

Trains on the standard library for so many seconds of one core (an exit after every pass, later ones weigh more), exports a Llama
folder to OUT/model with the shared layers written out, and answers Python prompts: no drafter, ``early_exit`` after the first pass, ``speed``.
Prints how often the token after each pass is the final one, ticks per token if retired tokens came straight out of the pipeline
(one tick = one read of the shared block; ``passes`` without speculation), and what the engine, which verifies with a whole pass, makes of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from presage import LLM, SamplingParams
from presage.bundled import bundled_path
from presage.engine.log import NullLog
from presage.train.data import prepare
from presage.train.model import Llama, export
from presage.train.recipe import Recipe, Shape

PROMPTS = (
    "import os\nimport sys\n\n",
    "class Reader:\n    def __init__(self, ",
    "def main():\n    ",
    "    def test_",
    "try:\n    import ",
    "if __name__ == ",
)


class Cyclic(Llama):
    """``block`` layers, applied ``passes`` times."""

    def __init__(self, shape: Shape, block: int) -> None:
        super().__init__(shape)
        self.block = block
        own = list(self.model.layers)[:block]
        self.model.layers = nn.ModuleList(own[i % block] for i in range(shape.layers))

    def exits(self, ids: Tensor) -> list[Tensor]:
        """Logits [B, T, V] after each pass."""
        from presage.train.model import _angles

        cos, sin = _angles(self.shape, ids.shape[1])
        x, out = self.model.embed_tokens(ids), []
        for i, layer in enumerate(self.model.layers, 1):
            x = layer(x, cos, sin)
            if i % self.block == 0:
                out.append(F.linear(self.model.norm(x), self.model.embed_tokens.weight))
        return out


def train(args: argparse.Namespace) -> Cyclic:
    """Train for ``args.seconds`` and export."""
    tokenizer = bundled_path("presage-tiny")
    assert tokenizer is not None
    shape = Shape(layers=args.block * args.passes, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=352)
    recipe = Recipe("cyclic", shape, steps=1, packages=(), texts=(), conversations=())
    corpus = prepare(recipe, args.out, args.out / "data", tokenizer / "tokenizer.json")
    model = Cyclic(shape, args.block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    start, step = time.process_time(), 0
    while (spent := time.process_time() - start) < args.seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, 0.05 + 1.5 * (1 - spent / args.seconds))
        x = torch.from_numpy(corpus.batch(0, step, 8, 192))
        losses = [F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()) for logits in model.exits(x[:, :-1])]
        loss = sum((i + 1) / args.passes * one for i, one in enumerate(losses))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    print(f"{step} steps, {step * 8 * 192} tokens, losses by pass: {' '.join(f'{one.item():.2f}' for one in losses)}")
    export(model, tokenizer / "tokenizer.json", args.out / "model")
    return model


def pipeline(guesses: np.ndarray) -> float:
    """Ticks per token of one sequence; ``guesses`` [T, passes]: the token after each pass of each place, the last one final.

    A token's successor starts for good in the tick after the pass from which on the guess no longer changes.
    """
    ready = [int(np.flatnonzero(row != row[-1]).max(initial=-1)) + 1 for row in guesses]
    start = 0
    for passes in ready[:-1]:
        start += passes + 1
    return (start + guesses.shape[1]) / len(guesses)


class Steps(NullLog):
    """Counts verifying steps."""

    def __init__(self) -> None:
        self.count = 0

    def decided(self, *args: Any) -> None:
        """A step was launched."""
        self.count += 1


def answer(args: argparse.Namespace, spec: dict[str, Any] | None) -> list[list[int]]:
    """Answer the prompts and print a line; whole sequences."""
    llm = LLM(
        str(args.out / "model"), threads=args.threads, max_num_seqs=4, kv_cache_memory="32MiB", speculative_config=spec, enable_prefix_caching=False
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, repetition_penalty=1.1)
    llm.generate(PROMPTS[0], params)
    steps = llm.engine.loop.log = Steps()
    llm.engine.loop.speculation.clear()
    start, out = time.perf_counter(), []
    for prompt in PROMPTS:
        out.append(llm.generate(prompt, params)[0])
    seconds, s = time.perf_counter() - start, llm.engine.loop.speculation
    count = sum(len(o.outputs[0].token_ids) for o in out)
    places = " ".join(f"{a / d:.2f}" for a, d in zip(s.accepted, s.drafted) if d)
    name = spec["method"] if spec else "none"
    print(f"{name:>11}: {count / seconds:5.0f} tokens/s, {count / steps.count:.2f} tokens/step, accepted by place: {places}")
    llm.close()
    return [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in out]


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    for name, default in (("block", 2), ("passes", 4), ("max-tokens", 96), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = train(args)
    fixed: dict[str, Any] = {"length": "fixed", "num_speculative_tokens": args.passes - 1}
    texts = [
        answer(args, s)
        for s in (None, {"method": "early_exit", "exit_layer": args.block, **fixed}, {"method": "speed", "stride": args.block, **fixed})
    ]
    if texts[1] != texts[0] or texts[2] != texts[0]:
        raise SystemExit("tokens differ between engines")
    with torch.no_grad():
        found = [np.stack([e[0].argmax(-1).numpy() for e in model.exits(torch.tensor([ids]))], axis=1)[-args.max_tokens :] for ids in texts[0]]
    agree = np.concatenate(found)
    print(f"final token after each pass: {' '.join(f'{float((agree[:, i] == agree[:, -1]).mean()):.2f}' for i in range(args.passes))}")
    print(f"ticks per token of an endless pipeline: {np.mean([pipeline(g) for g in found]):.2f}, without speculation {args.passes}")


if __name__ == "__main__":
    main()
