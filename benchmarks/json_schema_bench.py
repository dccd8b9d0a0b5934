"""Structured output over a subset of JSONSchemaBench with the bundled model.

    python benchmarks/json_schema_bench.py [--every 8] [--temperature 1.0] [--max-tokens 512] [--model presage-tiny]

Prints how many schemas are refused (and for which keyword), how many outputs finish within the limit, how many of those
validate (``jsonschema``), and the time of one mask. Every finished output must validate; the exit status is 1 if one does not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from presage import LLM, SamplingParams, StructuredOutputsParams
from presage.core.errors import GrammarError
from presage.core.plan import NewIds
from presage.core.request import Request
from presage.verify.grammar import GrammarCompiler, Masker
from presage.verify.grammar_masks import Job, Late

PROMPT = "Answer in short JSON."
NONE = np.zeros(0, np.int32)


def load(every: int) -> list[dict[str, Any]]:
    """Every n-th row of the shared subset: name, schema, tests."""
    root = Path(os.environ.get("PRESAGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    with gzip.open(root / "data/jsonschemabench/schemas.jsonl.gz", "rt") as rows:
        return [json.loads(row) for row in rows][::every]


def supported(compiler: GrammarCompiler, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str], list[float]]:
    """Rows that compile, reasons of the others, and seconds per compile."""
    kept, reasons, took = [], Counter[str](), []
    for row in rows:
        began = time.perf_counter()
        try:
            compiler.compile(StructuredOutputsParams(json=row["schema"]))
        except GrammarError as error:
            reasons[str(error.details.get("keyword") or error.message[:40])] += 1
            continue
        took.append(time.perf_counter() - began)
        kept.append(row)
    return kept, reasons, took


def verdict(row: dict[str, Any], text: str) -> str:
    """Why the text is wrong; empty if it parses and validates."""
    try:
        check = jsonschema.validators.validator_for(row["schema"])
        check(row["schema"]).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def mask_times(compiler: GrammarCompiler, rows: list[dict[str, Any]], steps: int = 64) -> np.ndarray:
    """Microseconds per mask along random legal texts."""
    masker, rng, took = Masker(compiler), random.Random(0), []
    for row in rows:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=row["schema"]))
        masker.open(0, Request(id=row["name"], prompt=NONE, sampling=params))
        for _ in range(steps):
            if masker.terminated(0):
                break
            masker.tracks[0].row = None  # a row kept from the last step would be counted as free
            began = time.perf_counter()
            bits = Late(masker, [Job(0, masker.tracks[0], NONE, NONE)]).masks()[1]
            took.append(time.perf_counter() - began)
            allowed = np.flatnonzero(np.unpackbits(bits[0].view(np.uint8), bitorder="little"))
            ids = np.array([allowed[rng.randrange(len(allowed))]], np.int32)
            masker.advance(NewIds(np.zeros(1, np.int32), np.array([0, 1], np.int32), ids, np.zeros(1, np.uint8)))
    return np.array(took) * 1e6


def report(rows: list[dict[str, Any]], outputs: list[Any]) -> int:
    """Print what finished and what validates; the number of invalid ones."""
    finished = [(row, o.outputs[0].text) for row, o in zip(rows, outputs, strict=True) if o.outputs[0].finish_reason == "stop"]
    wrong = [(row["name"], why) for row, text in finished if (why := verdict(row, text))]
    share = len(finished) / max(len(rows), 1)
    print(f"finished {len(finished)} of {len(rows)} ({share:.1%}), valid {len(finished) - len(wrong)} of {len(finished)}")
    for name, why in wrong:
        print(f"  invalid: {name}: {why[:160]}")
    return len(wrong)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--model", default="presage-tiny")
    return parser.parse_args()


def main() -> int:
    """Run and print; 1 if a finished output is invalid."""
    args = arguments()
    llm = LLM(model=args.model, max_num_seqs=32)
    tokenizer = llm.get_tokenizer()
    width = json.loads((Path(llm.engine.info.path) / "config.json").read_text())["vocab_size"]
    compiler = GrammarCompiler(tokenizer, width, tokenizer.eos_ids)
    rows = load(args.every)
    kept, reasons, took = supported(compiler, rows)
    print(f"schemas {len(rows)}, refused {len(rows) - len(kept)}: {dict(reasons.most_common())}")
    print(f"compile ms p50 {np.percentile(took, 50) * 1e3:.1f} p99 {np.percentile(took, 99) * 1e3:.0f}")
    times = mask_times(compiler, kept)
    print(f"mask us p50 {np.percentile(times, 50):.0f} p99 {np.percentile(times, 99):.0f} ({len(times)} masks)")
    compiler.close()
    template = tokenizer.chat_template
    text = template.render([{"role": "user", "content": PROMPT}], add_generation_prompt=True) if template else PROMPT + "\n"
    prompt = tokenizer.encode(text, add_special_tokens=template is None)
    params = [
        SamplingParams(
            temperature=args.temperature, max_tokens=args.max_tokens, seed=i, structured_outputs=StructuredOutputsParams(json=r["schema"])
        )
        for i, r in enumerate(kept)
    ]
    began = time.perf_counter()
    outputs = llm.generate([prompt] * len(kept), params)
    print(f"generated {sum(len(o.outputs[0].token_ids) for o in outputs)} tokens in {time.perf_counter() - began:.0f} s")
    wrong = report(kept, outputs)
    llm.close()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
