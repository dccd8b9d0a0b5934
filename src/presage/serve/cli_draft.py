"""``presage bench draft``: what a drafter would have guessed of recorded outputs, and what that costs, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from presage.core.errors import ConfigError
from presage.serve.cli import bench

if TYPE_CHECKING:
    from presage.bench.draft import Replay, Replayable


@bench.command
def draft(
    recordings: str,
    /,
    *,
    method: str = "suffix",
    config: str = "{}",
    length: str = "",
    length_config: str = "{}",
    tokenizer: str = "",
    train: int = 0,
    num_requests: int = -1,
    concurrency: int = 1,
    against_arctic: bool = True,
    output_json: Annotated[str | None, Parameter(name="--json")] = None,
) -> int:
    """Replay recorded outputs against a drafter: tokens per step, accepted share, and the drafter's own time and memory.

    Parameters
    ----------
    recordings:
        JSONL with prompt_token_ids and token_ids, or prompt and output as text, a request a row, oldest first.
    method:
        Drafter: suffix, ngram, lookahead, or another without forward passes of its own.
    config:
        Its settings as JSON.
    length:
        Length policy; without one every draft is verified whole.
    length_config:
        The policy's settings as JSON.
    tokenizer:
        Tokenizer folder or hub name for rows of text.
    train:
        The first so many requests are only learnt from.
    num_requests:
        Requests replayed after those; -1 for all.
    concurrency:
        Requests replayed at a time.
    against_arctic:
        Replay ArcticInference's suffix trees with the same settings too, if they are installed.
    output_json:
        File for the results as JSON.
    """
    from presage.bench import draft as bench_draft
    from presage.draft.length import make_length
    from presage.draft.registry import make_drafter

    rows = list(bench_draft.recordings(Path(recordings), _encoder(tokenizer), -1 if num_requests < 0 else train + num_requests))
    settings = _settings(config, "config")
    cap = int(settings.get("num_speculative_tokens", 16))
    drafters: list[tuple[str, Any]] = [(method, make_drafter(method, settings))]
    if method == "suffix" and against_arctic and (arctic := _arctic(settings, cap)) is not None:
        drafters.append(("arctic", arctic))
    found = []
    for name, drafter in drafters:
        bench_draft.learn(drafter, rows[:train])
        policy = make_length(length, **_settings(length_config, "length_config")) if length else None
        out = bench_draft.replay(drafter, rows[train:], name=name, concurrency=concurrency, cap=cap, length=policy)
        out.bytes_per_token = _bytes(drafter)
        found.append(out)
        print(_line(out))
    if output_json:
        text = json.dumps([{"name": o.name, "requests": o.requests, "steps": o.steps, "position": o.position, **o.figures()} for o in found])
        Path(output_json).write_text(text, encoding="utf-8")
    return 0


def _settings(text: str, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')} is not JSON: {error}", param=name) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--{name.replace('_', '-')} must be a JSON object", param=name)
    return settings


def _encoder(name: str) -> Callable[[str], list[int]] | None:
    if not name:
        return None
    from presage.tokenize.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(name)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _arctic(settings: dict[str, Any], cap: int) -> Replayable | None:
    from presage.bench.draft import ArcticDrafter

    get = settings.get
    try:
        return ArcticDrafter(
            get("suffix_decoding_max_tree_depth", 24), get("suffix_decoding_max_cached_requests", 10000), cap,
            get("suffix_decoding_max_spec_factor", 1.0), get("suffix_decoding_min_token_prob", 0.1), bool(get("suffix_decoding_tree", False)),
        )  # fmt: skip
    except ConfigError:
        return None


def _bytes(drafter: Any) -> float:
    stats = getattr(drafter, "stats", None)
    return float(stats()["bytes_per_token"]) if stats is not None and "bytes_per_token" in stats() else float("nan")


def _line(out: Replay) -> str:
    f = out.figures()
    return (
        f"{out.name:10s} {out.requests} requests, {out.steps} steps: {f['tokens_per_step']:.2f} tokens and {f['drafted_per_step']:.2f} drafted a "
        f"step, {100 * f['accepted_share']:.0f} % accepted; {f['us_per_lookup']:.1f} us a look-up, {f['us_per_drafted']:.2f} us a drafted and "
        f"{f['us_per_appended']:.2f} us an appended token, {f['bytes_per_token']:.0f} bytes a token"
    )
