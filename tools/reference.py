"""Write docs/reference/{cli,config,errors}.md from the code.

    python -m tools.reference            # write
    python -m tools.reference --check    # exit with 1 if a page is stale
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import App, Parameter

from presage.bench.config import RandomLengths, ServeBench
from presage.core import config as core_config
from presage.core.config import Group
from presage.core.errors import PresageError
from presage.serve import cli, cli_tools
from presage.serve.config import ServerConfig

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
NOTE = "<!-- Written by `python -m tools.reference`; do not edit. -->\n"


def groups() -> list[type[Group]]:
    """Every group of settings, the engine's first."""
    engine = [info.annotation for info in core_config.EngineConfig.model_fields.values()]
    return [*(g for g in engine if isinstance(g, type) and issubclass(g, Group)), ServerConfig, RandomLengths, ServeBench]


def type_text(kind: Any) -> str:
    """A type as a reader wants it: ``int``, ``str or none``, ``fcfs | priority``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_text(args[0])
    if origin in (Union, UnionType):
        return " or ".join("none" if a is NoneType else type_text(a) for a in args)
    if origin is Literal:
        return " \\| ".join(f"`{a}`" for a in args)
    if origin is list:
        return f"list of {type_text(args[0])}"
    return "JSON object" if origin is dict else getattr(kind, "__name__", str(kind))


def value_text(value: Any) -> str:
    """A default as it would be typed."""
    if value is None or value == "" or value in ([], {}):
        return ""
    return f"`{json.dumps(value) if isinstance(value, bool) else value}`"


def flag(name: str) -> str:
    """The option of a field or parameter."""
    return "--" + name.strip("_").replace("_", "-")


def cell(text: str) -> str:
    """Text in one table cell."""
    return re.sub(r"\s+", " ", text).strip().replace("``", "`").replace("|", "\\|")


def heading(group: type[Group]) -> str:
    """Title of a group's section."""
    return group.__name__


def config_page() -> str:
    """All settings by group."""
    out = [
        NOTE,
        "# Settings",
        "",
        "Each setting is a flag, an environment variable, a key of the YAML file given with `--config`, and a keyword of `LLM(...)`",
        "(engine groups only). A flag beats the environment, the environment beats the file. Unknown keys are errors.",
        "The variable of `--max-num-seqs` is `PRESAGE_MAX_NUM_SEQS`, and so on for all. `--no-...` turns a switch off.",
    ]
    for group in groups():
        out += ["", f"## {heading(group)}", "", cell(group.__doc__ or ""), "", "| Flag | Type | Default | Meaning |", "|---|---|---|---|"]
        for name, info in group.model_fields.items():
            default = value_text(info.get_default(call_default_factory=True))
            out.append(f"| `{flag(name)}` | {type_text(info.annotation)} | {default} | {cell(info.description or '')} |")
    return "\n".join(out) + "\n"


def errors_page() -> str:
    """The exception tree."""
    out = [
        NOTE,
        "# Errors",
        "",
        "Every error has a code that does not change between versions. Over HTTP the body is",
        '`{"error": {"message", "type", "param", "code"}}` with the status below;',
        "in Python it is the class, which also has a standard parent.",
        "",
        "| Code | Status | Class | Also a | When |",
        "|---|---|---|---|---|",
    ]
    for cls in tree(PresageError):
        parents = ", ".join(f"`{b.__name__}`" for b in cls.__bases__ if b is not Exception)
        out.append(f"| `{cls.code}` | {cls.status} | `{cls.__name__}` | {parents} | {cell(cls.__doc__ or '')} |")
    return "\n".join(out) + "\n"


def tree(cls: type[PresageError]) -> Iterator[type[PresageError]]:
    """A class and all below it that ``presage.core.errors`` defines, parents first, in the order of the source."""
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == cls.__module__:
            yield from tree(child)


def commands(app: App, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, function) of every command below ``app``."""
    for name in app:
        if name.startswith("-"):
            continue
        below = app[name]
        if below.default_command is not None:
            yield (*words, name), below.default_command
        yield from commands(below, (*words, name))


def described(text: str) -> tuple[str, dict[str, str]]:
    """A numpy-style docstring as (what it does, meaning by parameter)."""
    head, _, tail = text.partition("Parameters\n----------\n")
    found = re.findall(r"^(\w+):\n((?:[ ]{4}.*\n?)+)", tail, re.MULTILINE)
    return cell(head), {name: cell(meaning) for name, meaning in found}


def command_section(words: tuple[str, ...], function: Any) -> list[str]:
    """One command: usage, its own options, the groups it takes."""
    head, meanings = described(inspect.getdoc(function) or "")
    hints = get_type_hints(function, include_extras=True)
    usage, rows, taken = " ".join(words), [], []
    for name, p in inspect.signature(function).parameters.items():
        kind = hints[name]
        base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if isinstance(base, type) and issubclass(base, Group):
            taken.append(base)
        elif p.kind is p.POSITIONAL_ONLY:
            shown = names_of(kind) or [name.upper()]
            usage += f" {shown[0]}" if p.default is p.empty else f" [{shown[0]}]"
            rows.append(f"| `{shown[0]}` | {'required' if p.default is p.empty else value_text(p.default)} | {meanings.get(name, '')} |")
        else:
            default = "required" if p.default is p.empty else value_text(p.default)
            rows.append(f"| {', '.join(f'`{n}`' for n in names_of(kind) or [flag(name)])} | {default} | {meanings.get(name, '')} |")
    out = ["", f"## {' '.join(words)}", "", head, "", "```text", f"{usage} [OPTIONS]" if rows or taken else usage, "```"]
    if rows:
        out += ["", "| Option | Default | Meaning |", "|---|---|---|", *rows]
    if taken:
        links = ", ".join(f"[{heading(g)}](config.md#{heading(g).lower()})" for g in taken)
        out += ["", f"Also every flag of {links}."]
    return out


def names_of(kind: Any) -> list[str]:
    """Names given by a cyclopts Parameter; none otherwise."""
    given = next((a.name for a in get_args(kind)[1:] if isinstance(a, Parameter)), None) or ()
    return [given] if isinstance(given, str) else list(given)


def cli_page() -> str:
    """All commands."""
    out = [NOTE, "# Commands", "", "`presage COMMAND --help` prints the same. SGLang's spellings work too: " + aliases() + "."]
    for words, function in sorted(commands(cli.app, ("presage",)), key=lambda pair: pair[0]):
        out += command_section(words, function)
    return "\n".join(out) + "\n"


def aliases() -> str:
    """The alternative spellings."""
    return ", ".join(f"`{a}` for `{b}`" for a, b in cli.ALIASES.items())


def pages() -> dict[str, str]:
    """File name -> content."""
    if not cli_tools.__all__:
        raise RuntimeError("the commands beside serve are not registered")
    return {"cli.md": cli_page(), "config.md": config_page(), "errors.md": errors_page()}


def main() -> int:
    """Write or check."""
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv[1:] and stale:
        print(f"stale: {', '.join(stale)}; run python -m tools.reference")
        return 1
    print(f"reference: {len(stale)} pages written" if stale else "reference: up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
