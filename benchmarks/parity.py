"""Prints the parity table: every family's tiny random checkpoint against transformers, in float32 and bfloat16.

    PYTHONPATH=src:. python benchmarks/parity.py [--kernels cpu|reference] [case ...]

f32 err: largest |logit difference| to transformers in float32. bf16: mean |difference| to transformers' float32 run of the same bf16
weights, ours and transformers' own bf16 run; a ratio below 1 means that ours is nearer.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.tiny.families import CASES
from tests.tiny.plans import Part
from tests.tiny.rig import Rig, tiny

LENGTH = 120


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' logits [n, V] in float32."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def errors(case: str, kernels: str) -> tuple[float, float, float]:
    """(largest float32 error, mean bf16 error of ours, of transformers)."""
    ids = torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        reference, model = tiny(case, Path(folder), torch.float32, kernels)
        wide = float((Rig(model).logits([Part(0, 0, ids)])[0] - reference_logits(reference, ids)).abs().max())
    with tempfile.TemporaryDirectory() as folder:
        reference, model = tiny(case, Path(folder), torch.bfloat16, kernels)
        exact = reference_logits(copy.deepcopy(reference).float(), ids)
        ours = float((Rig(model).logits([Part(0, 0, ids)])[0] - exact).abs().mean())
        theirs = float((reference_logits(reference, ids) - exact).abs().mean())
    return wide, ours, theirs


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--kernels", choices=["cpu", "reference"], default="cpu")
    args = parser.parse_args()
    print(f"{'case':22} {'f32 err':>10} {'bf16 ours':>10} {'theirs':>10} {'ratio':>6}")
    for case in args.cases or CASES:
        wide, ours, theirs = errors(case, args.kernels)
        print(f"{case:22} {wide:10.1e} {ours:10.5f} {theirs:10.5f} {ours / theirs:6.2f}", flush=True)


if __name__ == "__main__":
    main()
