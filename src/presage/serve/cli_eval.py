"""``presage eval perplexity``: how well a model predicts a text, and what a quantization costs it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from presage.core.config import EngineConfig, ExecutorConfig, ModelConfig
from presage.core.errors import ConfigError
from presage.serve.cli import Executor, Model, app

if TYPE_CHECKING:
    from rich.table import Table

    from presage.bench.perplexity import Perplexity, Settings

evaluation = App(name="eval", help="Measure quality: perplexity of a text.")
app.command(evaluation)


@evaluation.command
def perplexity(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    data: str,
    field: str = "text",
    against: str = "",
    context: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    batch_tokens: int = 1024,
    as_json: Annotated[str | None, Parameter(name="--json")] = None,
    model: Model = ModelConfig(),
    executor: Executor = ExecutorConfig(),
) -> int:
    """Perplexity of a text by strided windows, through the kernels that serve; every token is scored once. Ctrl-C prints what there is so far.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    data:
        Text file, .jsonl file (one document a row), or folder of such files (one document each). Documents do not see one another.
    field:
        Field of a .jsonl row that holds the text.
    against:
        Quantizations (w8a8, w4a8-g64, ...) and checkpoints to compare with, with commas: relative change and its 95 % interval over windows.
    context:
        Tokens a window puts into the model.
    stride:
        Tokens from the start of a window to that of the next; each is scored with at least context - stride tokens before it.
    max_tokens:
        Use no more tokens of the text than this.
    batch_tokens:
        Tokens computed in one step.
    as_json:
        File for the numbers.
    """
    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    from presage.bench.perplexity import Settings

    settings = Settings(context, stride, max_tokens, batch_tokens)
    documents = read_documents(Path(data), field)
    base = EngineConfig(model=model.model_copy(update={"model": model_name}) if model_name else model, executor=executor)
    every = [("", base), *variants(base, against)]
    found = run_all(every, documents, settings)
    if found:
        print(f"{base.model.model} on {data}: {len(documents)} documents, context {context}, stride {stride}")
        _print(table(found))
    if as_json is not None:
        about = {"model": base.model.model, "data": data, "context": context, "stride": stride, "max_tokens": max_tokens}
        Path(as_json).write_text(json.dumps(about | {"results": as_dicts(found)}) + "\n", encoding="utf-8")
    return 0 if len(found) == len(every) and all(p.complete for p in found) else 130


def read_documents(path: Path, field: str = "text") -> list[str]:
    """The texts of a file, of the rows of a .jsonl file, or of a folder's files by name (hidden ones and those that are not text left out).

    Raises ConfigError naming what is missing or empty.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts))
        found = []
        for file in files:
            with contextlib.suppress(UnicodeDecodeError):
                found += _texts(file, field)
    else:
        try:
            found = _texts(path, field)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error}", param="data") from None
    found = [text for text in found if text.strip()]
    if not found:
        raise ConfigError(f"{path} holds no text", param="data")
    return found


def _texts(file: Path, field: str) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}", param="data") from None
    if file.suffix != ".jsonl":
        return [text]
    rows = [(n, _row(file, n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for n, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise ConfigError(f"{file}, row {n}: no text in field {field!r}", param="field")
    return [row[field] for _, row in rows]


def _row(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file}, row {number}: {error}", param="data") from None


def variants(base: EngineConfig, against: str) -> list[tuple[str, EngineConfig]]:
    """Label and configuration of each name: a path is another checkpoint, all else a quantization. Raises ConfigError for unknown ones."""
    from presage.quantize.schemes import parse_scheme

    found = []
    for name in filter(None, (part.strip() for part in against.split(","))):
        if Path(name).exists():
            change: dict[str, Any] = {"model": name, "quantization": None}
        else:
            change = {"quantization": parse_scheme(name).name}
        found.append((name, base.model_copy(update={"model": base.model.model_copy(update=change)})))
    return found


def run_all(every: list[tuple[str, EngineConfig]], documents: list[str], settings: Settings) -> list[Perplexity]:
    """Evaluate one configuration after another; Ctrl-C ends the round."""
    from presage.bench.perplexity import evaluate

    found: list[Perplexity] = []
    try:
        for label, config in every:
            with _bar(label or config.model.model) as watch:
                found.append(evaluate(config, documents, settings, label, watch, progress=sys.stderr.isatty()))
            if not found[-1].complete:
                break
    except KeyboardInterrupt:  # while a model was loading
        print("interrupted", file=sys.stderr)
    return found


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[Perplexity], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None, visible=False)  # hidden while the model loads: that has a bar of its own
        yield lambda p: bar.update(task, completed=len(p.nll), total=p.windows, visible=True, description=f"{title}: perplexity {p.value:.3f}")


def as_dicts(found: list[Perplexity]) -> list[dict[str, Any]]:
    """Results as plain data, the first being what the others are compared with; what could not be estimated is null."""
    from presage.bench.perplexity import compare

    out = []
    for p in found:
        row: dict[str, Any] = {"label": p.label, "perplexity": p.value, "bits_per_byte": p.bits_per_byte, "loss": p.loss}
        row |= {"windows": len(p.nll), "of_windows": p.windows, "tokens": int(p.tokens.sum()), "bytes": int(p.nbytes.sum()), "seconds": p.seconds}
        if p is not found[0]:
            change = compare(found[0], p)
            row |= {"change": change.relative, "low": change.low, "high": change.high}
        out.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return out


def table(found: list[Perplexity]) -> Table:
    """One row per configuration."""
    from rich.table import Table

    out = Table()
    for name in ("", "perplexity", "bits/byte", "tokens", "tok/s", "change", "95 % interval"):
        out.add_column(name, justify="right" if name else "left", no_wrap=True)
    for p, row in zip(found, as_dicts(found), strict=True):
        if not len(p.nll):
            continue
        part = "" if p.complete else f" ({len(p.nll)}/{p.windows} windows)"
        change = f"{row['change']:+.2%}" if row.get("change") is not None else ""
        interval = f"{row['low']:+.2%} to {row['high']:+.2%}" if row.get("low") is not None else ""
        speed = f"{row['tokens'] / p.seconds:.0f}" if p.seconds > 0 else ""
        out.add_row(p.label + part, f"{p.value:.4f}", f"{p.bits_per_byte:.4f}", str(row["tokens"]), speed, change, interval)
    return out


def _print(shown: Table) -> None:
    from rich.console import Console

    Console(width=max(110, Console().width)).print(shown)
