"""Dissecting runtime performance: where prefill and decode spend their time on this machine, from modules to the step and to a burst of requests."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from presage.bundled import bundled_path
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
LAYER = ("norm", "qkv", "rope", "attention", "o", "gate_up", "down")
GEMM = ("qkv", "o", "gate_up", "down", "head")
HOST = ("assemble", "sampling", "rest")
SHORT, LONG, MANY = 128, 1024, 16
CLAIMS = (
    Claim("modules add up", "percentages of a step, by module", "undisturbed step", "60M parameters (random), prefill and decode, median case",
          "5 % or less unexplained", 5.0, 20.0, "%"),
    Claim("clocks are cheap", "timing perturbs overlap", "undisturbed step", "the same, median case", "10 % or less slower", 10.0, 50.0, "%"),
    Claim("layers take nearly all", "decoder layers dominate", "embedding, head, sampling, host", "prefill of 256 tokens", "90 % or more of the step",
          90.0, 50.0, "%"),
    Claim("GEMM is the majority", "more than half of the layers' time", "everything else", "prefill, and decode of 16 sequences; the lower of both",
          "50 % or more of the step", 50.0, 0.0, "%"),
    Claim("element-wise work is a substantial rest", "norm and rotary about a tenth to a quarter, unfused", "the step", "prefill of 256 tokens",
          "10 % or more of the step", 10.0, 0.0, "%"),
    Claim("attention grows with context", "attention takes over at long context", "context 128", "decode of 16 sequences behind 1024 tokens, share",
          "3x the share or more", 3.0),
    Claim("quantised weights decode faster", "quantisation is fastest where it is available", "bfloat16", "w8a8, one sequence", "1.2x or more", 1.2),
    Claim("parts predict the whole", "not in the paper: the sheet's own check", "measured step", "4 sequences behind 512, from modules at 1 and 16",
          "error 15 % or less", 15.0, 50.0, "%"),
    Claim("the host limits small models", "absent from the paper", "60M parameters", "share of Python and sampling, one sequence, 5M parameters",
          "2x the share or more", 2.0),
    Claim("continuous batching wins a burst", "serving frameworks beat static batches", "static batches of 8",
          "presage-tiny, 64 requests at once, outputs of 8 to 256", "2x the tokens/s or more", 2.0),
)  # fmt: skip


def run(job: Job) -> Measured:
    """Two sizes and two precisions under the module profiler, then the burst."""
    from presage.bench.modules import cases
    from presage.bench.profile import Case

    ask = Case(4, 512)
    wanted = [*cases([1, MANY], [SHORT, LONG], []), ask, Case(1, 0, 256), *([] if job.quick else [Case(4, 0, 256)])]
    with tempfile.TemporaryDirectory() as folder:
        larger = _checkpoint(Path(folder), job.pick(8, 2))
        found = {name: _profile(job, name, wanted, **more) for name, more in {
            "60M, bfloat16": {"model": larger, "load_format": "dummy"},
            "60M, w8a8": {"model": larger, "load_format": "dummy", "quantization": "w8a8"},
            "5M, bfloat16": {"model": "presage-tiny"}}.items()}  # fmt: skip
    big, small = found["60M, bfloat16"], found["5M, bfloat16"]
    prefill, crowd, far, alone = big[Case(1, 0, 256)], big[Case(MANY, SHORT)], big[Case(MANY, LONG)], Case(1, SHORT)
    guess = _predict(big, ask)
    static, continuous = _burst(job)
    layers = {name: p.share(*LAYER) for name, p in (("prefill", prefill), ("decode", crowd))}
    return Measured(
        values={
            "modules add up": 100 * float(np.median([p.unexplained for p in big.values()])),
            "clocks are cheap": 100 * float(np.median([p.timed / p.step - 1 for p in big.values()])),
            "layers take nearly all": 100 * layers["prefill"],
            "GEMM is the majority": 100 * min(p.share(*GEMM) for p in (prefill, crowd)),
            "element-wise work is a substantial rest": 100 * prefill.share("norm", "rope"),
            "attention grows with context": far.share("attention") / crowd.share("attention"),
            "quantised weights decode faster": big[alone].step / found["60M, w8a8"][alone].step,
            "parts predict the whole": 100 * abs(guess / big[ask].step - 1),
            "the host limits small models": small[alone].share(*HOST, around=True) / big[alone].share(*HOST, around=True),
            "continuous batching wins a burst": continuous / static,
        },
        stops="w8a8 against bfloat16 by case: "
        + "; ".join(f"{p.label} {p.step / found['60M, w8a8'][c].step:.2f}x" for c, p in big.items())
        + f". Layers take {100 * layers['prefill']:.0f} % of a prefill and {100 * layers['decode']:.0f} % of a decode step of {MANY}.",
        panels=[_bars(name, profiles) for name, profiles in found.items() if name != "60M, w8a8"],
        grids=[_grid(name, profiles) for name, profiles in found.items()],
        notes=[
            f"One thread. Modules are timed on the model itself, undisturbed steps in turns; the fastest third of {job.pick(18, 3)} counts. "
            "Norms run apart from the linear layers that fuse them in service.",
            f"Burst: {continuous:.0f} tokens/s with 8 seats refilled at once, {static:.0f} in static batches of 8.",
            "Not reproduced: pre-training and fine-tuning (ZeRO, recomputation, LoRA), multi-GPU scaling, and the ranking of 2023's frameworks.",
        ],
    )  # fmt: skip


def _checkpoint(folder: Path, layers: int) -> str:
    """The bundled model's files with other sizes; weights are made up when it is loaded."""
    source = bundled_path("presage-tiny")
    assert source is not None
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    config = json.loads((source / "config.json").read_text()) | SIZES | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _profile(job: Job, name: str, wanted: list[Any], **settings: Any) -> dict[Any, Any]:
    from presage.bench.modules import profile_modules
    from presage.core.config import EngineConfig

    found = profile_modules(EngineConfig.of(threads=1, **settings), wanted, job.pick(18, 3))
    job.say(f"{name}: " + ", ".join(f"{p.label} {1e3 * p.step:.2f} ms" for p in found))
    return dict(zip(wanted, found))


def _predict(found: dict[Any, Any], ask: Any) -> float:
    """Seconds of a decode step, module by module: constant, per row, and per key read, through the measured corners."""
    corners = [c for c in found if c.known == 1 and c is not ask]
    a = np.array([[1.0, c.batch, c.batch * c.context] for c in corners])
    x = np.array([1.0, ask.batch, ask.batch * ask.context])
    names = {n for c in corners for n in found[c].seconds}
    return float(sum(x @ np.linalg.lstsq(a, np.array([found[c].seconds.get(n, 0.0) for c in corners]), rcond=None)[0] for n in names))


def _bars(name: str, found: dict[Any, Any]) -> Panel:
    groups = {"GEMM": GEMM, "attention": ("attention",), "norm, rotary": ("norm", "rope"), "embedding": ("embedding",), "host": HOST}
    some = [p for p in found.values() if p.case.batch in (1, MANY)]
    labels = [f"{p.phase[0].upper()}{p.case.batch}, {p.case.context + p.case.known - (p.case.known == 1)}" for p in some]
    return Panel(f"{name}: P(refill) or D(ecode), sequences, tokens", "", "% of the step",
                 {g: (labels, [100 * p.share(*parts) for p in some]) for g, parts in groups.items()}, kind="bar")  # fmt: skip


def _grid(name: str, found: dict[Any, Any]) -> Grid:
    parts = list(dict.fromkeys(n for p in found.values() for n in p.seconds))
    cell = lambda p, s: f"{1e3 * s:.3f} ({100 * s / p.step:.0f} %)" if s is not None else ""  # noqa: E731
    rows = [[n, *(cell(p, p.seconds.get(n)) for p in found.values())] for n in parts]
    rows.append(["**step**", *(f"{1e3 * p.step:.3f}" for p in found.values())])
    rows += [[f"{n}, around it", *(cell(p, p.around.get(n)) for p in found.values())] for n in ("loop", "tokenise", "detokenise")]
    return Grid(f"{name}: ms (share of the step)", ["module", *(p.label for p in found.values())], rows)


def _burst(job: Job) -> tuple[float, float]:
    """Output tokens per second of static batches and of the engine's own loop, both on the same engine and requests."""
    from presage.bench.ask import Engine
    from presage.core.config import EngineConfig
    from presage.core.sampling_params import SamplingParams

    engine = Engine(EngineConfig.of(model="presage-tiny", threads=1, max_num_seqs=8, enable_prefix_caching=False))
    n = job.pick(64, 16)
    outputs = np.clip(np.random.default_rng(0).geometric(1 / 48, n), 8, 256)
    prompts, params = engine.prompts(n, 32, 1), [SamplingParams(temperature=0.0, max_tokens=int(k), ignore_eos=True) for k in outputs]
    spans: dict[int, list[float]] = {8: [], n: []}
    try:
        for _ in range(job.pick(3, 1)):
            for group, times in spans.items():
                records = [engine.ask(prompts[i : i + group], params[i : i + group], 8)[0] for i in range(0, n, group)]
                times.append(sum(max(r.t_done for r in some) - some[0].t_sched for some in records))
    finally:
        engine.close()
    return outputs.sum() / min(spans[8]), outputs.sum() / min(spans[n])


RECIPE = Recipe("Dissecting runtime performance: module by module", "Zhang et al., arXiv 2311.03687", "tiny cpu", CLAIMS, run)
