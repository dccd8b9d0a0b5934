"""``presage bench draft``: what a drafter would have guessed of recorded outputs, and what that costs, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from presage.core.errors import ConfigError
from presage.serve.cli import bench

if TYPE_CHECKING:
    from presage.bench.draft import Replay
    from presage.bench.machine import Machine
    from presage.bench.recordings import Recording
    from presage.draft.settings import Speculative
    from presage.tokenize.tokenizer import Tokenizer

_HEAD = ("drafter", "tokens/step", "drafted/step", "accepted", "us/drafted", "us/step", "us/appended", "bytes/token")


@bench.command
def draft(
    recordings: str,
    /,
    *,
    speculative_config: Annotated[tuple[str, ...], Parameter(negative=())] = ("suffix",),
    tokenizer: str = "",
    prompt_column: str = "",
    output_column: str = "",
    messages_column: str = "",
    where: str = "",
    train: int = 0,
    num_requests: int = -1,
    concurrency: int = 1,
    step_ms: float = 10.0,
    row_ms: float = 0.2,
    arctic: bool = True,
    arctic_python: str = "",
    output_json: Annotated[str | None, Parameter(name="--json")] = None,
) -> int:
    """Replay recorded outputs against a drafter: tokens per step, accepted share, and the drafter's own time and memory.

    Parameters
    ----------
    recordings:
        JSONL or CSV, also gzipped: a request a row, oldest first.
    speculative_config:
        A drafter's name, or what the engine takes as --speculative-config. With a "length" in it that policy cuts the drafts; otherwise all
        that is drafted is verified. Repeat the flag to compare several.
    tokenizer:
        Tokenizer folder or hub name, for text.
    prompt_column:
        Column of the prompt, text or ids; prompt_token_ids or prompt by default.
    output_column:
        Column of the output, text or ids; token_ids or output by default.
    messages_column:
        Column with a conversation, instead of those two: each of the assistant's turns is an output.
    where:
        Take only rows with "column=value".
    train:
        The first so many requests are only learnt from.
    num_requests:
        Requests replayed after those; -1 for all.
    concurrency:
        Requests replayed at a time.
    step_ms:
        With a length policy: milliseconds of a step on the machine it is to imagine.
    row_ms:
        And of each row in it: one for each request and each draft token.
    arctic:
        Replay ArcticInference's suffix trees with the same settings beside method suffix, if they are installed.
    arctic_python:
        A Python with arctic-inference, if it is not in this environment.
    output_json:
        File for the results as JSON.
    """
    from presage.bench.machine import Machine
    from presage.bench.recordings import Columns
    from presage.bench.recordings import recordings as read

    words = _tokenizer(tokenizer)
    sides = [_side(text, words) for text in speculative_config]
    sides = [s for side in sides for s in (side, *(_beside(side, arctic_python) if arctic else ()))]
    columns = Columns(prompt_column, output_column, messages_column, where)
    encode = partial(words.encode, add_special_tokens=False) if words is not None else None
    rows = list(read(Path(recordings), encode, -1 if num_requests < 0 else train + num_requests, columns))
    if len(rows) <= train:
        raise ConfigError(f"{recordings} has {len(rows)} requests with an output, none is left after {train} to learn from", param="recordings")
    print(" ".join(f"{word:>13s}" for word in _HEAD))
    found = [_run(side, rows, train, concurrency, Machine(step_ms, row_ms)) for side in sides]
    if output_json:
        text = json.dumps([{"name": o.name, "requests": o.requests, "steps": o.steps, "position": o.position, **o.figures()} for o in found])
        Path(output_json).write_text(text, encoding="utf-8")
    return 0


@dataclass(slots=True, frozen=True)
class _Side:
    """What to replay: its name, how to make the drafter, its cap, and the length policy's setting if one was asked for."""

    name: str
    make: Callable[[], Any]
    config: Speculative
    length: bool

    @property
    def cap(self) -> int:
        """Most nodes of a draft."""
        return int(self.config.settings.get("num_speculative_tokens", 16))


def _side(text: str, tokenizer: Tokenizer | None) -> _Side:
    from presage.draft.registry import make_drafter
    from presage.draft.settings import parse_speculative

    named = text.lstrip().startswith("{")
    config = parse_speculative(text if named else {"method": text})
    if config is None:
        raise ConfigError("--speculative-config names no drafter", param="speculative_config")

    def make() -> Any:
        return make_drafter(config.drafter, config.settings, tokenizer=tokenizer)

    make()  # complain before anything is measured
    return _Side(config.drafter, make, config, named and "length" in json.loads(text))


def _beside(side: _Side, python: str) -> list[_Side]:
    """ArcticInference with the same settings, where it has them; it must be there if it was asked for."""
    from presage.bench.arctic import ArcticDrafter

    if side.name != "suffix":
        return []
    settings = {k: v for k, v in side.config.settings.items() if not k.endswith(("_cached_tokens", "_eviction", "_warm_up"))}
    try:
        ArcticDrafter(**settings, python=python)
    except ConfigError:
        if python:
            raise
        return []
    return [_Side("arctic", lambda: ArcticDrafter(**settings), side.config, side.length)]


def _run(side: _Side, rows: list[Recording], train: int, concurrency: int, machine: Machine) -> Replay:
    from presage.bench.draft import learn, replay
    from presage.draft.length import make_length

    def policy() -> Any:
        return make_length(side.config.length, **side.config.options) if side.length else None

    # A first few requests load or compile all kernels, in a drafter of their own.
    replay(side.make(), rows[:2], cap=side.cap, length=policy(), machine=machine)
    drafter = side.make()
    learn(drafter, rows[:train])
    out = replay(drafter, rows[train:], name=side.name, concurrency=concurrency, cap=side.cap, length=policy(), machine=machine)
    stats = getattr(drafter, "stats", None)
    out.bytes_per_token = float((stats() if stats is not None else {}).get("bytes_per_token", float("nan")))
    print(_line(out))
    if side.length:
        print(f"{side.config.length}: {out.figures()['verified_per_step']:.2f} verified/step; {machine.step_ms:g} ms a step and "
              f"{machine.row_ms:g} ms a row would be {out.figures()['speedup']:.2f}x faster than without drafts")  # fmt: skip
    return out


def _tokenizer(name: str) -> Tokenizer | None:
    from presage.tokenize.tokenizer import Tokenizer

    return Tokenizer.load(name) if name else None


def _line(out: Replay) -> str:
    f = out.figures()
    size = "-" if f["bytes_per_token"] != f["bytes_per_token"] else f"{f['bytes_per_token']:.0f}"
    cells = [out.name, f"{f['tokens_per_step']:.2f}", f"{f['drafted_per_step']:.2f}", f"{100 * f['accepted_share']:.0f} %"]
    cells += [f"{f[name]:.2f}" for name in ("us_per_drafted", "us_per_step", "us_per_appended")]
    return " ".join(f"{cell:>13s}" for cell in (*cells, size))
