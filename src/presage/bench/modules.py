"""Where the time of prefill and decode goes, module by module: ``presage profile modules`` (the method of arXiv 2311.03687).

Every operation of the model is timed where it is called, and the undisturbed step in turns with it on the same model, so that what the clocks
cost and what no module explains are both in the result. What happens around steps (the loop, text to ids and back) is timed in a running engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from presage.bench.datasets import random_ids
from presage.bench.profile import Case, Stopwatch, clocked, loop_seconds, sized, timed_executor
from presage.bench.steps import FixedSteps
from presage.bench.timed_ops import TimedNorm, TimedOps
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.build import Engine, build_engine
from presage.execute.executor import TorchExecutor
from presage.layers.linear import Linear
from presage.layers.moe import Experts
from presage.layers.ops import BoundNorm, Maybe, Ops
from presage.tokenize.detokenize import Detokenizer
from presage.tokenize.tokenizer import Tokenizer

MODULES = (
    "assemble", "embedding", "norm", "qkv", "rope", "attention", "o", "router", "gate_up", "down", "combine", "head", "sampling", "rest",
)  # fmt: skip
"""Parts of a step in the order of a table; ``rest``: the undisturbed step less all the others (below zero where the clocks cost more)."""
AROUND = ("loop", "tokenise", "detokenise")
"""What happens between steps and before and behind them."""
_OPERATIONS = {"norm": "norm", "rope_write": "rope", "attention": "attention", "moe_combine": "combine", "views": "assemble"}


class ModuleOps(TimedOps):
    """Timed operations whose linear layers go by what they are. ``on`` False: straight through, nothing is timed or split.

    ``split``: a norm that a linear layer would fuse runs by itself before it, so that both have a time of their own.
    """

    def __init__(self, inner: Ops, split: bool = True) -> None:
        self.split, self.on = split, False
        self.names: dict[int, str] = {}
        self._scratch: dict[tuple[int, ...], torch.Tensor] = {}
        super().__init__(inner)

    def learn(self, model: Any) -> None:
        """Note what each packed weight of the model is."""
        for layer in model.layers:
            for stage in layer.stages:
                owner = getattr(stage.fn, "__self__", None)
                for linear in (v for v in vars(owner).values() if isinstance(v, Linear)):
                    self._name(linear.name, linear.packs)
                if isinstance(owner, Experts):
                    self._name("router", owner.router.packs)
                    self._name("gate_up", [owner.gate_up])
                    self._name("down", [owner.down])
        self._name("head", model.lm_head.packs)

    def _name(self, name: str, packs: Sequence[Any]) -> None:
        # Families without a gate call the first matrix "up" or "fc"; in a table it stands in the same row.
        known = name if name in MODULES else "gate_up"
        self.names.update((id(pack), known) for pack in packs)

    def _timed(self, name: str, call: Any) -> Any:
        timed = super()._timed(_OPERATIONS.get(name.split()[0], name), call)
        return lambda *args: (timed if self.on else call)(*args)

    def _split(self, x: torch.Tensor, norm: TimedNorm) -> torch.Tensor:
        shape = tuple(x.shape)
        if shape not in self._scratch:
            self._scratch[shape] = torch.empty(shape, dtype=self.dtype)
        norm(x, self._scratch[shape])
        return self._scratch[shape]

    def linear(
        self, x: torch.Tensor, packed: Any, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float, norm: BoundNorm | None
    ) -> None:
        """Timed by what it is, its norm apart."""
        bare = norm.inner if isinstance(norm, TimedNorm) else norm
        if not self.on:
            self.inner.linear(x, packed, out, bias, residual, act, softcap, bare)
            return
        if self.split and isinstance(norm, TimedNorm):
            x, bare = self._split(x, norm), None
        began = time.perf_counter()
        self.inner.linear(x, packed, out, bias, residual, act, softcap, bare)
        self.seconds[self.names[id(packed)]].append(time.perf_counter() - began)

    def grouped_linear(self, x: torch.Tensor, experts: Any, offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        """Timed by what the experts are."""
        began = time.perf_counter()
        self.inner.grouped_linear(x, experts, offsets, out, act)
        if self.on:
            self.seconds[self.names[id(experts)]].append(time.perf_counter() - began)


@dataclass(slots=True)
class ModuleProfile:
    """One case. ``seconds`` by module (``MODULES`` that occur), they add up to ``step``, the undisturbed step; ``timed``: the step under
    the clocks; ``around``: seconds of ``AROUND`` per step, what was not measured left out."""

    case: Case
    seconds: dict[str, float]
    step: float
    timed: float
    around: dict[str, float] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """Prefill or decode."""
        return "prefill" if self.case.known > 1 else "decode"

    @property
    def label(self) -> str:
        """The case in a few words."""
        c = self.case
        return f"prefill {c.batch} x {c.known}" if c.known > 1 else f"decode {c.batch}, context {c.context}"

    @property
    def unexplained(self) -> float:
        """Share of the step that no module explains, or that clocks put on top of it; as a positive number."""
        return abs(self.seconds["rest"]) / self.step

    def share(self, *names: str, around: bool = False) -> float:
        """Share of the step that these modules take; ``around``: with what is around it, on both sides of the fraction."""
        more = sum(self.around.values()) if around else 0.0
        return (sum(self.seconds.get(name, 0.0) for name in names) + more) / (self.step + more)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        c = self.case
        about = {"phase": self.phase, "batch": c.batch, "context": c.context, "tokens": c.known, "step": self.step, "timed_step": self.timed}
        return about | {"modules": self.seconds, "around": self.around}


def cases(batches: Sequence[int], contexts: Sequence[int], prompts: Sequence[int]) -> list[Case]:
    """Prefill of whole prompts, then decoding behind each context, for each batch size."""
    prefill = [Case(b, 0, p) for p in prompts for b in batches]
    return prefill + [Case(b, c) for c in contexts for b in batches]


def profile_modules(config: EngineConfig, wanted: Sequence[Case], repeats: int = 20, split: bool = True) -> list[ModuleProfile]:
    """Profile all cases of one model. Raises ConfigError for cases that it cannot hold, and the typed errors of loading."""
    if not wanted or repeats < 1:
        raise ConfigError("nothing to profile: name at least one batch size and one repeat")
    config = sized(config, wanted)
    around = _around(config, wanted)
    executor, ops = module_executor(config, split)
    found = [profile_case(executor, ops, case, repeats) for case in wanted]
    for profile, more in zip(found, around, strict=True):
        profile.around = more
    return found


def module_executor(config: EngineConfig, split: bool = True) -> tuple[TorchExecutor, ModuleOps]:
    """An executor, not started, on a model whose operations are timed by module."""
    executor, ops = timed_executor(config, lambda ops: ModuleOps(ops, split))
    ops.learn(executor.model)
    return executor, ops


def profile_case(executor: TorchExecutor, ops: ModuleOps, case: Case, repeats: int) -> ModuleProfile:
    """One case on an executor whose thread is not running: undisturbed and timed steps in turns, means over the fastest third of each.

    On a busy machine the others hold pauses; and whole runs are kept, so that their modules belong together.
    """
    fixed = FixedSteps(executor, case.batch, case.context, case.known)
    whole: list[float] = []
    runs: list[dict[str, float]] = []
    try:
        plan = fixed.plan(known=case.known)
        for i in range(repeats + 2):
            seconds = fixed.seconds(plan)
            ops.on = True
            run = _modules(executor, ops, plan)
            ops.on = False
            if i > 1:  # the first two warm caches and scratch up
                whole.append(seconds)
                runs.append(run)
    finally:
        ops.on = False
        fixed.close()
    best = -(-repeats // 3)
    whole, runs = sorted(whole)[:best], sorted(runs, key=lambda run: run["step"])[:best]
    step, mean = statistics.fmean(whole), {name: statistics.fmean(run.get(name, 0.0) for run in runs) for name in (*MODULES, "step")}
    found = {name: seconds for name, seconds in mean.items() if seconds and name != "step"}
    return ModuleProfile(case, found | {"rest": step - sum(found.values())}, step, mean["step"])


def _modules(executor: TorchExecutor, ops: ModuleOps, plan: Any) -> dict[str, float]:
    """Seconds of a timed step by module, and as ``step``."""
    ops.take()
    began = time.perf_counter()
    stages = clocked(executor, plan)
    spent = {"step": time.perf_counter() - began, "assemble": stages["assemble"], "embedding": stages["embed"]}
    spent["sampling"] = stages.get("sampling", 0.0)
    taken = ops.take()
    taken.pop("embedding", None)  # the stage has it, with positions where a family adds them
    for name, times in taken.items():
        spent[name] = spent.get(name, 0.0) + sum(times)
    return spent


def _around(config: EngineConfig, wanted: Sequence[Case]) -> list[dict[str, float]]:
    """Seconds around the steps of each case, in a running engine."""
    watch = Stopwatch()
    engine = build_engine(config, watch, progress=True)
    try:
        longest = max(c.context + c.rows for c in wanted)
        if longest > engine.info.max_model_len:
            raise ConfigError(f"{longest} tokens are more than the model's length of {engine.info.max_model_len}", param="context")
        return [dict(_outside(engine, watch, case)) for case in wanted]
    finally:
        engine.close()


def _outside(engine: Engine, watch: Stopwatch, case: Case) -> Iterator[tuple[str, float]]:
    loop = _prefill_loop(engine, watch, case) if case.known > 1 else loop_seconds(engine, watch, case)
    if loop == loop:
        yield "loop", loop
    ids = random_ids(1, max(64, case.known), engine.info.vocab_size, 7, frozenset(engine.info.eos_ids))[0]
    if case.known > 1:
        yield "tokenise", case.batch * tokenise_seconds(engine.tokenizer, ids[: case.known])
    else:
        yield "detokenise", case.batch * detokenise_seconds(engine.tokenizer, ids)


def tokenise_seconds(tokenizer: Tokenizer, ids: Sequence[int], repeats: int = 5) -> float:
    """Seconds to encode the text of ``ids``, scaled to their number (the text may come back as more or fewer ids)."""
    text, times = tokenizer.decode(ids), []
    for _ in range(repeats):
        began = time.perf_counter()
        back = tokenizer.encode(text)
        times.append((time.perf_counter() - began) / max(1, len(back)))
    return len(ids) * statistics.median(times)


def detokenise_seconds(tokenizer: Tokenizer, ids: Sequence[int]) -> float:
    """Seconds a token takes on its way to text, one at a time as in a stream."""
    state = Detokenizer(tokenizer)
    began = time.perf_counter()
    for one in ids:
        state.push([one])
    return (time.perf_counter() - began) / len(ids)


def _prefill_loop(engine: Engine, watch: Stopwatch, case: Case, repeats: int = 3) -> float:
    """Median seconds outside steps from the arrival of a batch of prompts to the first token of the last."""
    times, watch.engine, info = [], engine, engine.info
    for turn in range(repeats):
        prompts = random_ids(case.batch, case.known, info.vocab_size, 1000 * turn + case.known, frozenset(info.eos_ids))
        names = [f"prefill-{case}-{turn}-{i}" for i in range(case.batch)]
        watch.left, watch.marks = set(names), []
        began, inside = time.monotonic(), engine.loop.stats["step_seconds"]
        for name, ids in zip(names, prompts):
            sampling = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0)
            engine.add(Request(id=name, prompt=np.array(ids, np.int32), sampling=sampling, arrival=began))
        while watch.left:
            engine.driver.step()
        if watch.failure is not None:
            raise watch.failure
        times.append(time.monotonic() - began - (engine.loop.stats["step_seconds"] - inside))
    return statistics.median(times)
