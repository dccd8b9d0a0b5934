"""Two measured runs of vLLM, predicted from hardware tables alone, beside what other simulators publish.

    python benchmarks/predict_vllm.py

``tables``: operators measured on one device of the kind (by LLMServingSim); the second run had two devices, so its tables are scaled by the
ratio of two rooflines. ``roofline``: data sheet only. Nothing is fitted to the runs. Needs ../shared/data (or PRESAGE_SHARED).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from presage.bench.workloads import read_vllm_records
from presage.core.config import EngineConfig
from presage.simulate.measured import compare
from presage.simulate.targets import make_target, shape_of

DATA = Path(os.environ.get("PRESAGE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
RUNS = {
    "llama": ("Llama-3.1-8B", "meta-llama--Meta-Llama-3.1-8B", 1),
    "qwen": ("Qwen3-32B", "Qwen--Qwen3-32B", 2),
}
LLMSERVINGSIM = {
    "llama": {"ttft": (-0.040, -0.086, -0.020), "tpot": (-0.010, 0.0, 0.006), "e2e": (-0.018, -0.012, -0.016)},
    "qwen": {"ttft": (0.013, 0.017, 0.009), "tpot": (0.008, 0.008, 0.013), "e2e": (0.010, 0.009, 0.013)},
}
"""Mean, median, p99 of the same runs: bench/examples/RTXPRO6000/*/validation/summary.txt of casys-kaist/LLMServingSim at 5daddb21a545.
Its Qwen3-32B prediction used tables measured on two devices."""
OTHERS = (
    "Vidur (arXiv 2405.05465, for its own runs): below 9 % latency error, 12.7 % for 7B at 95 % load",
    "simulators of LLMServingSim's first version's kind, for their own runs: about 15 %",
)


def main() -> None:
    """Predict and print."""
    config = EngineConfig.of(max_num_batched_tokens=2048, max_num_seqs=128, enable_prefix_caching=False)
    found = {}
    for which, (name, file, tp) in RUNS.items():
        model = shape_of(DATA / "model_configs" / f"{file}_config.json")
        records = read_vllm_records(DATA, which)
        tables = str(DATA / "perf_llmservingsim" / f"RTXPRO6000_{name}_tp1")
        for kind, latency in (("tables", tables), ("roofline", "roofline")):
            target = make_target(config, model, "rtxpro6000", tp=tp, latency=latency, max_model_len=16384)
            errors = found[f"{which} {kind}"] = compare(records, config, target)
            for measure, error in errors.items():
                row(name, tp, kind, measure, [f"{key} {value:+7.1%}" for key, value in error.items()])
        for measure, values in LLMSERVINGSIM[which].items():
            row(name, tp, "LLMServingSim", measure, [f"{key} {value:+7.1%}" for key, value in zip(("mean", "median", "p99"), values)])
    for line in OTHERS:
        print(line)
    print(json.dumps(found))


def row(name: str, tp: int, kind: str, measure: str, words: list[str]) -> None:
    """One line of the table."""
    print(f"{name:13} x {tp} {kind:14} {measure:5} {'  '.join(words)}")


if __name__ == "__main__":
    main()
