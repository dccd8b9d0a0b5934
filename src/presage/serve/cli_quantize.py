"""``presage quantize``: a checkpoint with 4- or 8-bit weights, calibrated on text, that loads into the integer kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from presage.serve.cli import app

if TYPE_CHECKING:
    from presage.quantize.calibrate import Report

EVERY_SECONDS = 10.0
WORST = 3


@app.command(name="quantize")
def quantize_command(
    model_name: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    scheme: str = "w4a8",
    calibrate: str | None = None,
    method: str = "gptq",
    samples: int = 128,
    length: int = 512,
    bits: float = 0.0,
    head: bool = True,
    damp: float = 0.01,
    act_order: bool = False,
    alpha: float = 0.5,
) -> int:
    """Quantise a checkpoint after training, calibrated on text, and write it in the compressed-tensors format.

    Parameters
    ----------
    model_name:
        Checkpoint folder, hub name, or presage-tiny.
    output:
        New folder for the quantised checkpoint.
    scheme:
        w4a8, w8a8, w4a16 or w8a16; after 4-bit ones -g32, -g64 or -g128 sets the group, -z adds zero points.
    calibrate:
        Text file, or JSON lines with a text or a conversation in each row; like what the model will be used for. Only rtn does without.
    method:
        gptq (errors compensated), awq or smoothquant (channels scaled, then rounded), awq+gptq, smoothquant+gptq, or rtn (rounded).
    samples:
        Windows of calibration text, spread over the file.
    length:
        Tokens of a window.
    bits:
        Average bits of the layers' weights, scales included, up to which the most sensitive linears are kept in 8 bits; 0 = none is.
    head:
        Quantise the LM head too, to 8 bits (4 with -h4 after the scheme).
    damp:
        What gptq adds to the diagonal of the second moments, as a part of their mean.
    act_order:
        gptq rounds the inputs with the largest second moments first.
    alpha:
        How much of the inputs' range smoothquant moves into the weights, 0 to 1.
    """
    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    from presage.quantize.calibrate import Settings
    from presage.quantize.calibrate import calibrate as run

    settings = Settings(scheme, method, samples, length, bits, head, damp, act_order, alpha)
    began = time.monotonic()
    with _progress() as progress:
        report = run(model_name, output, calibrate, settings, progress)
    for line in summary(report, time.monotonic() - began):
        print(line)
    return 0


def summary(report: Report, seconds: float) -> Iterator[str]:
    """What was done, a few lines."""
    yield f"{report.folder}: {len(report.sites)} linears, {report.average_bits:.2f} bits a weight in the layers, {seconds:.0f} s"
    yield from report.notes
    measured = sorted((s for s in report.sites if s.error == s.error), key=lambda s: -s.error)
    if measured:
        worst = ", ".join(f"{s.name} {s.error:.2%}" for s in measured[:WORST])
        yield f"output error (squared, relative): {sum(s.error for s in measured) / len(measured):.2%} on average; most: {worst}"


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for people, a line every ten seconds for logs."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("reading text", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class _Lines:
    """Sparse lines on stderr."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._last = time.monotonic()
            print(f"{what}: {done} of {total} windows", file=sys.stderr, flush=True)
