"""``presage profile step | modules``: where the time of a step goes, as a table in the terminal and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from presage.core.config import CacheConfig, ExecutorConfig, ModelConfig, SchedulerConfig
from presage.serve.cli import Cache, Executor, Model, Scheduler, app, engine_config

if TYPE_CHECKING:
    from rich.table import Table

    from presage.bench.modules import ModuleProfile
    from presage.bench.profile import Part, StepProfile

profile = App(name="profile", help="Look inside: where the time of a step goes.")
app.command(profile)

BAR = 20
NAMES = {"assemble": "assemble batch", "head": "final norm, head", "other": "other python"}


@profile.command
def step(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    batch: str = "1,8,16",
    context: int = 256,
    known: int = 1,
    draft_nodes: int = 0,
    repeats: int = 20,
    per_kernel: bool = False,
    as_json: Annotated[str | None, Parameter(name="--json")] = None,
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
) -> int:
    """Time the stages of a step: milliseconds, share, bytes read against plain reading, operations; and the loop around it.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    batch:
        Numbers of sequences, with commas; one table each.
    context:
        Tokens of each sequence that are computed already.
    known:
        Tokens a sequence brings to the step: 1 is decoding, more is a prompt's chunk.
    draft_nodes:
        Draft nodes to verify behind them, as a chain.
    repeats:
        Steps measured; medians are shown.
    per_kernel:
        Time every operation by name and shape too (the loop is left out).
    as_json:
        File for the numbers.
    """
    from presage.bench.profile import Case, profile_steps
    from presage.kernels.cpu.environment import prepare_environment

    cases = [Case(n, context, known, draft_nodes) for n in _numbers(batch)]
    prepare_environment()
    found = profile_steps(engine_config(model_name, model, cache, scheduler, executor), cases, repeats, per_kernel)
    _show(found)
    if as_json is not None:
        Path(as_json).write_text(json.dumps([as_dict(p) for p in found]) + "\n", encoding="utf-8")
    return 0


@profile.command
def modules(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    batch: str = "1,8",
    prompt: str = "256",
    context: str = "128,1024",
    repeats: int = 20,
    fused: bool = False,
    figure: str | None = None,
    as_json: Annotated[str | None, Parameter(name="--json")] = None,
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
) -> int:
    """Time the modules of prefill and decode: embedding, norms, projections, rotary, attention, MLP, head, sampling, and what is around steps.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    batch:
        Numbers of sequences, with commas.
    prompt:
        Prompt lengths of prefill, with commas.
    context:
        Tokens behind which sequences decode, with commas.
    repeats:
        Steps measured of each kind; the fastest third counts.
    fused:
        Leave norms inside the linear layers that fuse them, as a step runs; otherwise they are timed by themselves.
    figure:
        File for stacked bars: .svg or .html.
    as_json:
        File for the numbers.
    """
    from presage.bench.modules import cases, profile_modules
    from presage.kernels.cpu.environment import prepare_environment

    wanted = cases(_numbers(batch), _numbers(context, "context"), _numbers(prompt, "prompt"))
    prepare_environment()
    config = engine_config(model_name, model, cache, scheduler, executor)
    found = profile_modules(config, wanted, repeats, not fused)
    _show_modules(found, fused)
    if figure is not None:
        from presage.bench.bars import write_bars

        write_bars(figure, f"{config.model.model}: time by module", [(p.label, p.seconds | p.around) for p in found])
    if as_json is not None:
        Path(as_json).write_text(json.dumps([p.as_dict() for p in found]) + "\n", encoding="utf-8")
    return 0


def _show_modules(found: list[ModuleProfile], fused: bool) -> None:
    from rich.console import Console

    console = Console(width=max(110, 24 + 20 * len(found)))
    console.print(module_table(found, fused))
    for p in found:
        console.print(f"{p.label}: longest is {max(p.seconds, key=lambda k: p.seconds[k])}; clocks cost {p.timed / p.step - 1:+.1%} of the step")


def module_table(found: list[ModuleProfile], fused: bool = False) -> Table:
    """Milliseconds and share of the step by module, a column per case."""
    from rich.table import Table

    from presage.bench.modules import AROUND, MODULES

    table = Table(title="ms and share of the step" + (", norms inside qkv, gate_up and head" if fused else ""), title_justify="left")
    table.add_column("module", no_wrap=True)
    for p in found:
        table.add_column(p.label, justify="right")
    for name in MODULES:
        if any(name in p.seconds for p in found):
            table.add_row(name, *(_cell(p.seconds.get(name), p.step) for p in found))
    table.add_section()
    table.add_row("step", *(_cell(p.step, p.step) for p in found))
    for name in AROUND:
        if any(name in p.around for p in found):
            table.add_row(f"{name}, per step", *(_cell(p.around.get(name), p.step) for p in found))
    return table


def _cell(seconds: float | None, step: float) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} {seconds / step:6.1%}"


def _numbers(text: str, what: str = "batch") -> list[int]:
    from presage.core.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{what} sizes are positive numbers with commas between them, not {text!r}", param=what)
    return [int(part) for part in parts]


def as_dict(p: StepProfile) -> dict[str, Any]:
    """A profile as plain data; what was not measured is null."""
    found = asdict(p) | {"nbytes": p.nbytes, "operations": p.operations}
    found["loop"] = None if math.isnan(p.loop) else p.loop
    return found


def _show(found: list[StepProfile]) -> None:
    from rich.console import Console

    console = Console(width=max(110, Console().width))
    for p in found:
        console.print(stage_table(p))
        if p.kernels:
            console.print(kernel_table(p))


def stage_table(p: StepProfile) -> Table:
    """A step by its stages."""
    from rich.table import Table

    rows = f"{p.known} token{'s' if p.known > 1 else ''}" + (f" and {p.nodes} draft node{'s' if p.nodes > 1 else ''}" if p.nodes else "")
    table = Table(title=f"batch {p.batch}, {rows} each behind {p.context}; plain read {p.read / 1e9:.1f} GB/s", title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")
    table.add_column("", width=BAR)
    for name in ("MB read", "GB/s", "of read", "GFLOP/s"):
        table.add_column(name, justify="right")
    for part in p.parts:
        table.add_row(*_row(part, p))
    table.add_section()
    table.add_row(*_row(_whole(p), p))
    if not math.isnan(p.loop):
        table.add_row("loop around it", "1", f"{p.loop * 1e3:.3f}", f"{p.loop / p.step:.1%}", "", "", "", "", "")
    return table


def _whole(p: StepProfile) -> Part:
    from presage.bench.profile import Part

    return Part("step", 1, p.step, p.nbytes, p.operations)


def _row(part: Part, p: StepProfile) -> list[str]:
    share, speed = part.seconds / p.step, part.nbytes / part.seconds if part.seconds > 0 else 0.0
    # A part that reads less than a megabyte, or from the caches, says nothing about memory.
    streams = part.nbytes >= 1 << 20
    return [
        NAMES.get(part.name, part.name),
        str(part.calls),
        f"{part.seconds * 1e3:.3f}",
        f"{share:.1%}",
        _bar(share),
        f"{part.nbytes / 1e6:.1f}" if part.nbytes else "",
        f"{speed / 1e9:.1f}" if streams else "",
        f"{speed / p.read:.0%}" if streams else "",
        f"{part.operations / part.seconds / 1e9:.0f}" if part.operations and part.seconds > 0 else "",
    ]


def _bar(share: float) -> str:
    eighths = max(0, min(8 * BAR, round(8 * BAR * share)))
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else "▏▎▍▌▋▊▉"[eighths % 8 - 1])


def kernel_table(p: StepProfile) -> Table:
    """A step by its operations, longest first."""
    from rich.table import Table

    table = Table(title=f"operations of the step with batch {p.batch}", title_justify="left")
    table.add_column("operation", no_wrap=True)
    for name in ("calls", "ms", "share", "us a call"):
        table.add_column(name, justify="right")
    for k in p.kernels:
        table.add_row(k.name, str(k.calls), f"{k.seconds * 1e3:.3f}", f"{k.seconds / p.step:.1%}", f"{k.seconds / k.calls * 1e6:.1f}")
    return table
