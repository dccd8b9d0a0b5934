"""What quantization costs in quality: perplexity of the bundled model on WikiText-2 and on Python it was not trained on.

    python benchmarks/quality.py [--checkpoint FOLDER ...] [--against w8a8,w4a8,...] [--max-tokens N] [--json OUT] [--percent OUT]

``--against`` names are quantised on the fly by rounding to nearest (RTN); ``--checkpoint`` adds calibrated ones made from the same model
(``presage quantize``). Changes carry 95 % bootstrap intervals over windows. ``--percent`` writes what ``peers.py --quality`` reads: for each
precision the worst change over the texts, of the best checkpoint where any is given.

Data lies in the shared folder (PRESAGE_SHARED, or ``shared`` beside the checkout). Python comes from two places: HumanEval and MBPP
solutions, and the sources of installed packages that the training recipe does not list.
"""

from __future__ import annotations

from presage.kernels.cpu.environment import prepare_environment

prepare_environment()

import argparse  # noqa: E402
import hashlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from presage.bench.perplexity import Settings  # noqa: E402
from presage.core.config import EngineConfig  # noqa: E402
from presage.serve.cli_eval import as_dicts, read_documents, run_all, variants  # noqa: E402
from presage.train.recipe import TINY  # noqa: E402

SHARED = Path(os.environ.get("PRESAGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
WIKITEXT = "wikitext2/valid.txt"
TARGETS = {"w8a8": 0.005, "w4a8": 0.03}
AGAINST = "w8a8,w4a8,w4a8-g64,w4a8-g32,w4a8-h4,w4a8-g64-h4,w4a8-g32-h4"


@dataclass
class Text:
    """Documents of one kind, and a sentence on where they are from and whether the model has seen them."""

    name: str
    documents: list[str]
    source: str


def wikitext(data: Path) -> Text:
    """WikiText-2; the bundled model has seen this file, so only differences mean something."""
    seen = "part of the bundled model's training text" if WIKITEXT in TINY.texts else "not in the bundled model's training text"
    return Text("wikitext2", read_documents(data / WIKITEXT), f"{WIKITEXT}, {seen}")


def problems(data: Path) -> Text:
    """HumanEval and MBPP: prompt with solution, and solution."""
    rows = [json.loads(line) for line in (data / "humaneval" / "HumanEval.jsonl").read_text(encoding="utf-8").splitlines()]
    human = [row["prompt"] + row["canonical_solution"] for row in rows]
    rows = [json.loads(line) for line in (data / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()]
    basic = [row["code"].replace("\r\n", "\n") for row in rows]
    source = f"{len(human)} HumanEval prompts with solutions and {len(basic)} MBPP solutions, in no training text of the bundled model"
    return Text("python problems", human + basic, source)


def packages(names: list[str]) -> Text:
    """Sources of installed packages. Ends with a message for one that the recipe trains on."""
    texts = []
    for name in names:
        if name in TINY.packages:
            raise SystemExit(f"{name} is in the bundled model's training text")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"package {name} is not installed")
        folder = Path(next(iter(spec.submodule_search_locations)))
        texts += [f.read_text(encoding="utf-8") for f in sorted(folder.rglob("*.py"))]
    named = ", ".join(f"{name} {version(name)}" for name in names)
    return Text("python packages", [t for t in texts if t.strip()], f"sources of {named}, not in the bundled model's training recipe")


def measure(text: Text, base: EngineConfig, against: str, settings: Settings) -> list[dict[str, Any]]:
    """One entry per configuration, the unquantised one first."""
    rows = as_dicts(run_all([("", base), *variants(base, against)], text.documents, settings))
    digest = hashlib.sha256("\0".join(text.documents).encode()).hexdigest()
    return [{"text": text.name, "sha256": digest, **row} for row in rows]


def target_of(label: str) -> tuple[float | None, bool]:
    """The allowed change of a configuration, and whether the target speaks of it (W4A8 is to be calibrated)."""
    precision = next((p for p in TARGETS if p in Path(label).name), None)
    return (TARGETS[precision], precision == "w8a8" or Path(label).exists()) if precision else (None, False)


def markdown(text: Text, rows: list[dict[str, Any]]) -> str:
    """The table of one text."""
    head = f"**{text.name}**: {text.source}; the first {rows[0]['tokens']} tokens scored in {rows[0]['windows']} windows"
    lines = [head, "", "| weights | perplexity | bits/byte | change | 95 % interval | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        target, meant = target_of(row["label"])
        allowed = "" if target is None else f"≤ +{target:.1%}" + ("" if meant else " when calibrated")
        change = f"{row['change']:+.2%} | {row['low']:+.2%} to {row['high']:+.2%}" if row.get("low") is not None else " | "
        lines.append(f"| {Path(row['label']).name} | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} | {change} | {allowed} |")
    return "\n".join(lines)


def percent(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Percent over the unquantised model by precision, the worst of the texts: the best checkpoint's, else plain RTN's."""
    worst: dict[str, float] = {}
    for row in rows:
        if row.get("change") is not None:
            worst[row["label"]] = max(100 * row["change"], worst.get(row["label"], -math.inf))
    found = {}
    for precision in TARGETS:
        mine = [value for label, value in worst.items() if precision in Path(label).name and Path(label).exists()]
        if mine or precision in worst:
            found[precision] = min(mine) if mine else worst[precision]
    return found


def main() -> None:
    """Print a table for each text, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="presage-tiny")
    parser.add_argument("--checkpoint", action="append", default=[], help="calibrated checkpoint of the same model, folder named after its scheme")
    parser.add_argument("--against", default=AGAINST)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--packages", default="jinja2,cyclopts")
    parser.add_argument("--only", choices=("wikitext2", "problems", "packages"), action="append")
    parser.add_argument("--context", type=int, default=512, help="the bundled model was trained at 512 positions")
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--percent", type=Path)
    args = parser.parse_args()
    if missing := [c for c in args.checkpoint if not Path(c).exists()]:
        raise SystemExit(f"no checkpoint at {', '.join(missing)}")
    makers = {
        "wikitext2": lambda: wikitext(args.data),
        "problems": lambda: problems(args.data),
        "packages": lambda: packages(args.packages.split(",")),
    }
    settings = Settings(args.context, args.stride, args.max_tokens)
    base, against = EngineConfig.of(model=args.model), ",".join([*filter(None, [args.against]), *args.checkpoint])
    every: list[dict[str, Any]] = []
    for name in args.only or makers:
        text = makers[name]()
        rows = measure(text, base, against, settings)
        every += rows
        if not rows or any(r["windows"] < r["of_windows"] for r in rows) or not math.isfinite(rows[0]["perplexity"]):
            raise SystemExit(f"{text.name}: interrupted")
        print(markdown(text, rows) + "\n", flush=True)
    print(json.dumps(every))
    if args.json:
        args.json.write_text(json.dumps(every) + "\n", encoding="utf-8")
    if args.percent:
        args.percent.write_text(json.dumps(percent(every)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
