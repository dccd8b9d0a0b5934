"""A whole step by its rows: what verifying drafts costs beside plain decoding, on one sequence, through the executor.

    python benchmarks/step.py MODEL [--quantization w4a8] [--contexts 256,2048] [--rows 1,2,4,8,16,32] [--repeats 15]

A step of n rows is one known token and a chain of n - 1 draft nodes, all of them judged. Row counts are taken in turns; medians, and over
one row the median of the paired ratios. For the parts of a step see ``presage profile step``.
"""

from __future__ import annotations

from presage.kernels.cpu.environment import prepare_environment

prepare_environment()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402

from presage import LLM  # noqa: E402
from presage.bench.steps import FixedSteps  # noqa: E402
from presage.bench.traffic import step_bytes  # noqa: E402


def numbers(text: str) -> list[int]:
    """Integers with commas between them."""
    return [int(part) for part in text.split(",")]


def measure(llm: LLM, context: int, rows: list[int], repeats: int) -> list[dict[str, float]]:
    """One entry per number of rows. The engine's executor must be closed."""
    executor = llm.engine.executor
    fixed = FixedSteps(executor, 1, context, max(rows))
    plans = [fixed.plan(nodes=n - 1) for n in rows]
    taken = [[fixed.seconds(plan) for plan in plans] for _ in range(repeats + 2)][2:]
    found = []
    for i, (n, plan) in enumerate(zip(rows, plans)):
        median = statistics.median(t[i] for t in taken)
        ratios = sorted(t[i] / t[0] for t in taken)
        entry = {"context": context, "rows": n, "ms": median * 1e3, "gb_s": step_bytes(executor, plan) / median / 1e9}
        found.append(entry | {"ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4], "high": ratios[-1 - len(ratios) // 4]})
    fixed.close()
    return found


def main() -> None:
    """Print one line per case, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quantization")
    parser.add_argument("--contexts", type=numbers, default=[256, 2048])
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    longest = max(args.contexts) + max(args.rows)
    llm = LLM(args.model, quantization=args.quantization, max_model_len=longest, max_num_seqs=2, kv_cache_memory="512MiB")
    llm.engine.executor.close()
    found = [entry for context in args.contexts for entry in measure(llm, context, args.rows, args.repeats)]
    for e in found:
        spread = f"({e['low']:.2f}..{e['high']:.2f})"
        print(f"{e['context']:6d} tokens {e['rows']:4d} rows {e['ms']:8.2f} ms {e['gb_s']:6.1f} GB/s   {e['ratio']:.2f}x {spread}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
