"""``python -m presage.train``: rebuild a bundled model from open text."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from presage.core.errors import PresageError
from presage.train.data import prepare
from presage.train.loop import Trainer
from presage.train.model import export
from presage.train.recipe import RECIPES


def main(argv: list[str] | None = None) -> int:
    """Prepare the text, train (or go on training), export. Returns the exit status."""
    args = _parser().parse_args(argv)
    recipe = RECIPES[args.recipe]
    if args.without_packages:
        recipe = replace(recipe, packages=())
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.use_deterministic_algorithms(True)
    try:
        corpus = prepare(recipe, args.data, args.out / "data", args.tokenizer)
        trainer = Trainer(recipe, corpus, args.out)
        trainer.run(args.steps)
        export(trainer.model, args.out / "data" / "tokenizer.json", args.out / "model")
    except PresageError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(json.dumps({"step": trainer.step, "validation_loss": trainer.validate(), "model": str(args.out / "model")}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m presage.train", description=__doc__)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder with the text sets the recipe lists")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an interrupted run there goes on")
    parser.add_argument("--steps", type=int, help="stop after this step (the schedule stays the recipe's)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of training one (a draft needs its target's)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; bits are promised for equal thread counts")
    parser.add_argument("--without-packages", action="store_true", help="leave installed packages out (the standard library stays)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
