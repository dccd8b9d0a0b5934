"""Intelligence per watt: accuracy per watt and joule of the bundled pair, what batches and precision change, and what routing would save."""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.bench.energy import Meter, Modelled, Source, attribute, open_source, process_use
from presage.reproduce import Claim, Grid, Job, Measured, Panel, Recipe
from presage.reproduce.speculation import roofline
from presage.simulate.latency.hardware import hardware

CLOUD, LOCAL = "presage-tiny", "presage-tiny-draft w8a8"
SETTINGS: dict[str, dict[str, Any]] = {name: {"model": name.split()[0], "quantization": "w8a8" if " " in name else None, "threads": 1} for name in (
    CLOUD, "presage-tiny w8a8", "presage-tiny-draft", LOCAL)}  # fmt: skip
TEXTS = {"stories": "tinystories_sample/tiny.txt", "encyclopaedia": "wiki_plain/wiki.txt", "articles": "wikitext2/valid.txt",
         "drama": "tinyshakespeare/input.txt"}  # fmt: skip
TASK = "next word of four texts, greedy, 6 tokens"
CLAIMS = (
    Claim("joules a token fall with the batch", "server batches are out of its scope", "1 request in flight", "16 in flight, 64 tokens each",
          "2x fewer or better", 2.0),
    Claim("int8 keeps the accuracy", "precision is a knob", "bfloat16", TASK, "within 1 point", 1.0, 5.0, "points"),
    Claim("repeatable", "readings every 50 ms", "mean of 5 runs", "J a question, variation, median setting", "5 % or less", 5.0, 20.0, "%"),
    Claim("shares add up", "idle gaps go to the next query", "the meter", "16 in flight: sum over requests", "within 1 %", 1.0, 10.0, "%"),
    Claim("metering is free", "a process of its own", "no meter", "processor time; tokens must be equal", "within 1 %", 1.0, 10.0, "%"),
    Claim("oracle routing, this pair", "80 % of the energy", "all to the large one", "questions both answer alike go to the small one",
          "50 % saved or more", 50.0, 0.0, "%"),
    Claim("oracle routing, 8B local and 70B cloud", "80 % of the energy", "all to 70B on 4 H100", "coverage as here; 8B on an RTX 4090, roofline",
          "50 % saved or more", 50.0, 0.0, "%"),
    Claim("router by confidence, 8B and 70B", "60 % with a router right 4 times in 5", "all to 70B on 4 H100", "1 point of accuracy lost at most",
          "30 % saved or more", 30.0, 0.0, "%"),
    Claim("cloud chips are better per joule", "1.4x or more", "RTX 4090", "H100, Llama-3.1-8B, one request, roofline", "1.4x or more", 1.4),
    Claim("cloud chips are better per watt", "1.4x or more", "RTX 4090", "the same, IPW", "1.4x or more", 1.4),
)  # fmt: skip


@dataclass
class Taken:
    """A setting on the task: its words, which were right, how sure it was, joules a question (their median: ``each``) and watts of each run."""

    said: list[str]
    right: np.ndarray
    sure: np.ndarray
    joules: list[float]
    watts: list[float]
    each: float


def run(job: Job) -> Measured:
    """The task, then batches under the meter, then routing."""
    told: list[str] = []
    source = open_source("auto", lambda: Modelled(hardware("epyc-zen4-2c"), process_use(2)), say=told.append)
    items = [item for name in TEXTS for item in _cloze(job, name, job.pick(150, 6))]
    took = {name: _take(job, source, settings, items) for name, settings in SETTINGS.items()}
    for name, t in took.items():
        job.say(f"{name}: {100 * t.right.mean():.1f} % right, {1e3 * t.each:.1f} mJ a question ({source.name})")
    loads = [1, 2, 4, 8, 16, 32] if not job.quick else [1, 16]
    per_token, off, free = _batches(job, source, loads)
    big, small = took[CLOUD], took[LOCAL]
    here = (small.each, big.each)
    real = (_query(job, "meta-llama--Meta-Llama-3.1-8B", "rtx4090", 1)[0], _query(job, "meta-llama--Meta-Llama-3.1-70B", "h100", 4)[0])
    curves = {"this pair": _cascade(small, big, *here), "8B on RTX 4090, 70B on 4 H100": _cascade(small, big, *real)}
    held = [saved for saved, lost in curves["8B on RTX 4090, 70B on 4 H100"] if lost <= 1.0]
    chips = {(c, b): _query(job, "meta-llama--Meta-Llama-3.1-8B", c, 1, b) for c in ("rtx4090", "h100") for b in (1, 32)}
    alike = float(np.mean([a == b for a, b in zip(small.said, big.said)]))
    return Measured(
        values={
            "joules a token fall with the batch": per_token[0] / per_token[loads.index(16)],
            "int8 keeps the accuracy": 100 * abs(float(took["presage-tiny w8a8"].right.mean() - big.right.mean())),
            "repeatable": 100 * float(np.median([np.std(t.joules) / np.mean(t.joules) for t in took.values()])),
            "shares add up": 100 * off,
            "metering is free": 100 * free,
            "oracle routing, this pair": 100 * alike * (1 - here[0] / here[1]),
            "oracle routing, 8B local and 70B cloud": 100 * alike * (1 - real[0] / real[1]),
            "router by confidence, 8B and 70B": max(held, default=0.0),
            "cloud chips are better per joule": chips["rtx4090", 1][0] / chips["h100", 1][0],
            "cloud chips are better per watt": chips["rtx4090", 1][1] / chips["h100", 1][1],
        },
        stops=f"an escalated question costs both models: with the small one at {100 * here[0] / here[1]:.0f} % of the large one's joules (8B of 70B: "
        f"{100 * real[0] / real[1]:.0f} %) a cascade loses energy once fewer than that share of questions stay with it; "
        + "H100 over RTX 4090 per joule by requests in flight: "
        + ", ".join(f"{chips['rtx4090', b][0] / chips['h100', b][0]:.1f}x at {b}" for b in (1, 32)),
        panels=[
            Panel("presage-tiny", "requests in flight", f"J per output token ({source.name})", {"64 tokens each": (loads, per_token)}, logx=True),
            Panel("cascade by confidence", "energy saved, %", "accuracy lost, points",
                  {k: ([s for s, _ in v], [lost for _, lost in v]) for k, v in curves.items()}, level=1.0),
            Panel("accuracy by text", "", "right, %", {n: (list(TEXTS), (100 * t.right.reshape(len(TEXTS), -1).mean(1)).tolist())
                                                       for n, t in took.items() if n in (CLOUD, LOCAL)}, kind="bar"),
        ],
        grids=[Grid(f"Accuracy per watt and joule ({source.name})", ["setting", "right, %", "mJ a question", "W", "IPW, 1/kW", "IPJ, 1/J"], [
            [n, f"{100 * t.right.mean():.1f}", f"{1e3 * t.each:.1f}", f"{np.median(t.watts):.1f}", f"{1e3 * t.right.mean() / np.median(t.watts):.1f}",
             f"{t.right.mean() / t.each:.2f}"] for n, t in took.items()])],
        notes=[
            f"Joules here are {'modelled' if source.name == 'modelled' else 'measured'}: {source.about}." + "".join(f" {t}." for t in told),
            f"The small one says the large one's word in {100 * alike:.0f} % of the questions; the paper's 20 models together reach 88.7 %. "
            "Both have seen these texts in training. A modelled joule is processor time and waiting times constants: trust ratios only.",
        ],
    )  # fmt: skip


def _cloze(job: Job, name: str, count: int) -> list[tuple[str, str]]:
    """(48 words, the next word) from places spread over a text; only plain words are asked for."""
    words = job.data(TEXTS[name]).read_text(encoding="utf-8", errors="replace").split()
    spots = [i for i in range(48, len(words)) if words[i].isalpha()]
    return [(" ".join(words[i - 48 : i]), words[i]) for i in spots[:: len(spots) // count][:count]]


def _take(job: Job, source: Source, settings: dict[str, Any], items: list[tuple[str, str]]) -> Taken:
    from presage import LLM, SamplingParams

    llm = LLM(**settings, max_num_seqs=8, max_model_len=512, kv_cache_memory="32MiB", enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
    out = llm.generate([q for q, _ in items], params)
    said = ["".join(re.findall(r"^\s*(\w+)", o.outputs[0].text)) for o in out]
    right = np.array([s == word for s, (_, word) in zip(said, items)])
    sure = np.array([o.outputs[0].logprobs[0][o.outputs[0].token_ids[0]].logprob for o in out])
    joules, watts = [], []
    for _ in range(job.pick(5, 2)):
        with Meter(source) as meter:
            llm.generate([q for q, _ in items], params)
        joules.append(meter.total / len(items))
        watts.append(meter.total / meter.seconds)
    llm.close()
    return Taken(said, right, sure, joules, watts, float(np.median(joules)))


def _batches(job: Job, source: Source, loads: list[int]) -> tuple[list[float], float, float]:
    """J per output token by load; how far shares miss the meter; what a meter adds in processor time (nan: it changed the tokens)."""
    from presage.bench.ask import Engine
    from presage.core.config import EngineConfig
    from presage.core.sampling_params import SamplingParams

    engine = Engine(EngineConfig.of(model="presage-tiny", threads=1, enable_prefix_caching=False))
    prompts, params = engine.prompts(64, 32, 1), SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    found, off, work, said = [], 0.0, [], []
    try:
        for load in loads:
            trials = []
            for _ in range(job.pick(3, 1)):
                with Meter(source) as meter:
                    records, _ = engine.ask(prompts[: max(4, 2 * load)], params, load)
                trials.append(meter.total / sum(r.n_out for r in records))
                off = max(off, abs(attribute(meter.times, meter.joules, records).sum() / meter.total - 1)) if load == 16 else off
            found.append(float(np.median(trials)))
        for i in range(2 * job.pick(8, 2)):
            began = time.process_time()
            with Meter(source) if i % 2 else nullcontext():
                said.append(engine.ask(prompts[:16], params, 16)[1])
            work.append(time.process_time() - began)
    finally:
        engine.close()
    same = all(t == said[0] for t in said)
    return found, off, min(work[1::2]) / min(work[::2]) - 1 if same else float("nan")


def _query(job: Job, model: str, device: str, tp: int, batch: int = 1, inputs: int = 512, outputs: int = 256) -> tuple[float, float]:
    """Joules of a query and mean watts by roofline: a prefill, then a step per token."""
    at = inputs + outputs / 2
    steps = np.array([[batch * inputs, batch, 0, batch * inputs, 0, batch, batch * inputs, batch * inputs**2, 1.0, 0, 0, 0],
                      [batch, batch, batch, 0, 0, batch, batch * at, batch * at, 1.0, 0, 0, 0]])  # fmt: skip
    seconds, joules = np.array([1, outputs]) @ roofline(job, model, device, tp).predict(steps)
    return float(joules / batch), float(joules / seconds)


def _cascade(small: Taken, big: Taken, local: float, cloud: float) -> list[tuple[float, float]]:
    """(per cent of energy saved, points of accuracy lost) by threshold: the small one answers, the large one where it was not sure."""
    found = []
    for level in np.quantile(small.sure, np.linspace(0, 1, 21)):
        stays = small.sure >= level
        spent = local + (1 - stays.mean()) * cloud
        found.append((100 * float(1 - spent / cloud), 100 * float(big.right.mean() - np.where(stays, small.right, big.right).mean())))
    return found


RECIPE = Recipe("Intelligence per watt: accuracy per watt and joule", "Saad-Falcon et al., arXiv 2511.07885", "tiny cpu", CLAIMS, run)
