"""``presage explain``: a request's life from a decision log or from the server that keeps one, as coloured text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode

from cyclopts import Parameter

from presage.core.errors import ConfigError, PresageError
from presage.serve.cli import app

if TYPE_CHECKING:
    from rich.console import Console

    from presage.engine.explain import History
    from presage.serve.explained import Show

ANSWER_SECONDS = 120.0
"""A long log takes a while to read."""


@app.command
def explain(
    request_id: str = "",
    /,
    *,
    url: str = "http://127.0.0.1:8000",
    decision_log: Annotated[str, Parameter(name=["--decision-log", "--log"])] = "",
    steps: int = 12,
    tokenizer: str = "",
    api_key: str = "",
) -> int:
    """Show what happened to a request: its drafts as coloured text, why it waited, was preempted, and got these draft lengths.

    Parameters
    ----------
    request_id:
        The request's id, as its answer has it. Of a log read here a part that no other has is enough, and none lists the requests.
    url:
        Address of the running server to ask; it must keep a decision log.
    decision_log:
        Folder that ``--decision-log`` wrote, to read it here instead. At level tokens the text is shown, at level shape a mark per token.
    steps:
        Steps shown one by one, evenly spread; 0 for none, -1 for all.
    tokenizer:
        Tokenizer folder or hub name for a log read here; the log's model by default.
    api_key:
        Key to send to the server.
    """
    from rich.console import Console

    from presage.serve.explained import PIPE

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPE
    if decision_log:
        return _read(console, decision_log, request_id, steps, tokenizer)
    return _ask(console, url, request_id, steps, api_key)


# ---- a server


def _ask(console: Console, url: str, request_id: str, steps: int, api_key: str) -> int:
    """Print what the server tells. Raises the server's own error."""
    from presage.serve.cli_top import get
    from presage.serve.errors import Failed

    if not request_id:
        raise ConfigError("a server tells about one request: give the id that its answer had", param="request_id")
    wishes = {"steps": steps, "width": console.width, "colour": int(console.is_terminal and not console.no_color)}
    try:
        text = get(url, f"/explain/{quote(request_id, safe='')}?{urlencode(wishes)}", api_key, ANSWER_SECONDS)
    except HTTPError as error:
        try:
            told = json.loads(error.read())["error"]
            message, code = str(told["message"]), str(told["code"])
        except (ValueError, KeyError, TypeError):
            message, code = f"{url} answers {error.code} {error.reason}; is it a server of Presage?", "not_found"
        raise Failed(message, code=code, status=error.code) from None
    except OSError as error:
        why = getattr(error, "reason", error)
        raise ConfigError(f"no server at {url}: {why}; name a log with --decision-log to read it here", param="url") from None
    sys.stdout.write(text)
    return 0


# ---- a log read here


def _read(console: Console, folder: str, request_id: str, steps: int, tokenizer: str) -> int:
    from presage.engine.explain import history, requests
    from presage.engine.replay import read_frames
    from presage.serve.explained import tell

    if not any(Path(folder).glob("*.plog")):
        raise ConfigError(f"{folder} holds no decision log", param="decision_log")
    known = requests(read_frames(folder))
    if not request_id:
        return _list(console, known)
    found = history(read_frames(folder), _one(request_id, known))
    tell(console, found, _words(found, tokenizer), steps)
    return 0


def _one(wanted: str, known: dict[str, Any]) -> str:
    """The id that was meant. Raises ConfigError naming what there is."""
    hits = [wanted] if wanted in known else [name for name in known if wanted in name]
    if len(hits) == 1:
        return hits[0]
    some = ", ".join((hits or list(known))[-5:]) or "none"
    raise ConfigError(f"{len(hits)} requests of this log match {wanted!r}; {'among them' if hits else 'the last ones'}: {some}", param="request_id")


def _list(console: Console, known: dict[str, list[Any]]) -> int:
    from rich.table import Table

    table = Table("request", "prompt", "output", "finish", box=None)
    for name, (prompt, output, finish) in known.items():
        table.add_row(name, str(prompt), str(output), " ".join(finish) or "running")
    console.print(table)
    return 0


def _words(found: History, tokenizer: str) -> Show | None:
    """How ids become text; None if the log has no ids."""
    from presage.serve.explained import has_ids, shown_by
    from presage.tokenize.tokenizer import Tokenizer

    if not has_ids(found):
        return None
    model = found.header.get("config", {}).get("model", {})
    source = tokenizer or model.get("tokenizer") or model.get("model", "")
    try:
        return shown_by(Tokenizer.load(source, None if tokenizer or model.get("tokenizer") else model.get("revision")))
    except PresageError:
        return lambda ids: "".join(f" {i}" for i in ids)
