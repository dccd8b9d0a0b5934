"""What a decision log says about a request, as coloured text: its drafts, why it waited, was preempted, got these draft lengths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from presage.draft.sources import SOURCES
from presage.engine.explain import Branch, History, Ran

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from presage.tokenize.tokenizer import Tokenizer

COLOURS = dict(zip(SOURCES, ("white", "green", "cyan", "blue", "magenta", "yellow", "bright_yellow", "bright_magenta"), strict=True))
REJECTED = "dim red strike"
Show = Callable[[Iterable[int]], str]
PIPE = 160
"""Columns where there is no terminal: the table needs more than 80."""


def tell(console: Console, found: History, show: Show | None, steps: int) -> None:
    """Print the history. ``show``: how ids become text, None if there are none; ``steps``: how many are listed (0: none, -1: all)."""
    _head(console, found)
    for index, branch in sorted(found.branches.items()):
        if len(found.branches) > 1:
            console.rule(f"branch {index}")
        _branch(console, found, branch, show, steps)


def shown_by(tokenizer: Tokenizer) -> Show:
    """Ids as this tokenizer's text."""
    return lambda ids: "".join(_tame(c) for c in b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace"))


def has_ids(found: History) -> bool:
    """Whether the log kept ids of the request's tokens."""
    return any(ran.ids for b in found.branches.values() for ran in b.ran)


def _tame(c: str) -> str:
    """A character that cannot steer the terminal."""
    return c if c.isprintable() or c in "\n\t" else "·"


def _head(console: Console, found: History) -> None:
    from rich.markup import escape

    console.print(f"[bold]{escape(found.id)}[/bold]", *map(escape, _asked_for(found.request)))
    for text, n in Counter(text for kind, text in found.notes if kind == "policy_error").items():
        console.print(f"a policy failed {n} times: {text}", markup=False)


def _asked_for(request: dict[str, Any]) -> list[str]:
    """What of the request matters here."""
    if not request:
        return ["(its arrival is no longer in the log)"]
    prompt, out = request["prompt"], []
    out.append(f"{prompt if isinstance(prompt, int) else len(prompt) // 4} prompt tokens,")
    out.append(f"at most {request['max_tokens']} new," if request["max_tokens"] else "no limit of its own,")
    out.append(f"priority {request['priority']}" + (f", tenant {request['tenant']}" if request["tenant"] else ""))
    return [*out, f", draft {json.dumps(request['draft'])}"] if request.get("draft") else out


def _branch(console: Console, found: History, branch: Branch, show: Show | None, steps: int) -> None:
    _times(console, found, branch)
    for line in _delays(found, branch):
        console.print(line, markup=False)
    ran = [r for r in branch.ran if len(r.parent)]
    console.print(*_lengths(found, branch), sep="\n", markup=False)
    if branch.ran and (ran or show):
        marks = "" if console.is_terminal else " (accepted drafts in [], rejected ones in ⟨⟩)"
        console.print(f"\ndrafts{marks}:", *(f"[{COLOURS[s]}]{s}[/]" for s in _sources(ran)), f"[{REJECTED}]rejected[/]")
        console.print(_text(branch.ran, show, console.is_terminal))
    if steps:
        _steps(console, found, branch, steps)


def _times(console: Console, found: History, branch: Branch) -> None:
    prefill = next((r for r in branch.ran if r.new), None)
    hit = branch.ran[0].start if branch.ran else 0
    parts = [f"finish {branch.finish or 'running'}", f"{sum(r.new for r in branch.ran)} tokens in {len(branch.ran)} steps"]
    if branch.ran and found.arrival:
        parts.append(f"first step after {_s(branch.ran[0].now - found.arrival)}")
    if prefill is not None and found.arrival:
        parts.append(f"first token after {_s(prefill.now + prefill.seconds - found.arrival)}")
    if branch.finish and found.arrival:
        parts.append(f"end after {_s(branch.ended - found.arrival)}")
    if hit:
        parts.append(f"{hit} prompt tokens were in the cache")
    console.print(", ".join(parts))
    for r in branch.ran:
        if r.fault:
            console.print(f"step {r.step} failed: {r.fault.strip().splitlines()[-1]}", markup=False)


def _delays(found: History, branch: Branch) -> list[str]:
    out = []
    for d in branch.delays:
        what = {"queue": "waited in the queue", "preempted": "preempted"}.get(d.cause, f"waited for its {d.cause}")
        until = "until now" if d.until is None else _s(d.until - d.since)
        out.append(f"{what} at {_s(d.since - (found.arrival or d.since))}, {until}")
        out += [f"    {text}" + (f" ({n} steps)" if n > 1 else "") for text, n in d.reasons.most_common()]
    return out


def _lengths(found: History, branch: Branch) -> list[str]:
    """Why the drafts were as long as they were."""
    decoding = [r for r in branch.ran if r.new]
    why = Counter(_why(found, r) for r in decoding)
    spec = (found.header.get("config", {}).get("speculation") or {}).get("speculative_config")
    if not spec:
        return ["no speculation"] if decoding else []
    drafted, kept = sum(len(r.parent) for r in decoding), sum(len(r.path) for r in decoding)
    share = f" ({kept / drafted:.0%})" if drafted else ""
    return [f"{drafted} draft tokens, {kept} accepted{share}; steps by draft length:", *(f"    {n:4} {text}" for text, n in why.most_common())]


def _why(found: History, ran: Ran) -> str:
    """What decided the length of one step's draft."""
    wish, nodes = found.request.get("draft") or {}, len(ran.parent)
    if ran.count > 1:
        return "none: the prompt was computed"
    if wish.get("method") == "none" or wish.get("num_speculative_tokens") == 0:
        return "none: the request wants no drafts"
    if not ran.asked:
        return "none: nothing to look up, or drafting did not pay (length policy)"
    if ran.granted < ran.asked and nodes == ran.granted:
        return "cut to what max_draft_tokens or the free KV blocks allowed" if nodes else "none: no room in max_draft_tokens or in the KV cache"
    if nodes == ran.granted:
        return "all that the length policy asked for" + (" (the request's own limit)" if nodes == wish.get("num_speculative_tokens") else "")
    return ("fewer than asked" if nodes else "none") + ": the drafter had no more, or the rest was not worth its row"


def _sources(ran: list[Ran]) -> list[str]:
    return [SOURCES[i] for i in sorted({int(s) for r in ran for s in r.source})]


# ---- drafts as text


def _text(ran: list[Ran], show: Show | None, colours: bool) -> Text:
    """The output: accepted tokens in their drafter's colour, the target's own plain, the likeliest rejected path struck out."""
    from rich.text import Text

    text = Text()
    for r in ran:
        for run, source in _runs(r):
            words = show(run) if show else "■" * len(run)
            text.append(words if colours or not source else f"[{words}]", style=COLOURS.get(source, ""))
        if len(lost := _lost(r)):
            words = show(r.token[lost].tolist()).replace("\n", "↵") if show else "□" * len(lost)
            text.append(words if colours else f"⟨{words}⟩", style=REJECTED)
    return text


def _runs(ran: Ran) -> list[tuple[list[int], str]]:
    """New ids with their drafter ("" = the target itself), equal neighbours together. Without ids: zeros."""
    ids, out = ran.ids or [0] * ran.new, list[tuple[list[int], str]]()
    for i, token in enumerate(ids):
        source = "" if i >= len(ran.path) else SOURCES[int(ran.source[ran.path[i]])] if len(ran.source) else SOURCES[0]
        if not out or out[-1][1] != source:
            out.append(([], source))
        out[-1][0].append(token)
    return out


def _lost(ran: Ran) -> list[int]:
    """The likeliest path that was rejected, from where the accepted one ends."""
    node, out = ran.path[-1] if ran.path else -1, list[int]()
    while len(below := [i for i in range(len(ran.parent)) if ran.parent[i] == node]):
        node = max(below, key=lambda i: float(ran.prob[i]))
        out.append(node)
    return out


def _steps(console: Console, found: History, branch: Branch, limit: int) -> None:
    from rich.table import Table

    ran = branch.ran
    every = 1 if limit < 0 else max(1, -(-len(ran) // limit))
    table = Table(box=None, pad_edge=False)
    for name in ("at", "step", "ms", "foreseen", "batch", "rows", "ask", "grant", "verify", "accept", "new", "draft length"):
        table.add_column(name, no_wrap=True, min_width=None if name == "draft length" else len(name))
    for r in ran[::every]:
        at = _s(r.now - found.arrival) if found.arrival else ""
        took, foreseen = f"{1e3 * r.seconds:.2f}", f"{1e3 * r.predicted:.2f}" if r.predicted else ""
        counts = (r.requests, r.rows, r.asked, r.granted, len(r.parent), len(r.path), r.new)
        table.add_row(at, str(r.step), took, foreseen, *map(str, counts), _why(found, r))
    console.print()
    console.print(table, soft_wrap=False)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
