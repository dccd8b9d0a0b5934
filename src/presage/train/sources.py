"""Where the text comes from: Python sources on this machine, text files, conversations turned into ChatML."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from presage.core.errors import ConfigError
from presage.train.recipe import Recipe

TEST_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "__pycache__"})
ROLES = {"prompter": "user", "human": "user", "USER": "user", "SYSTEM": "assistant", "gpt": "assistant", "function_call": "assistant"}
ROLES.update(observation="tool")
_PARAGRAPH_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Document:
    """One text; ``source`` is the group it belongs to, ``file`` where it lies here, ``name`` where it lies on any machine."""

    source: str
    file: Path
    name: str
    text: str


def documents(recipe: Recipe, data: Path) -> Iterator[Document]:
    """All documents in a fixed order. Raises ConfigError naming a listed file or package that is missing, before anything is read."""
    folders = {package: _package_folder(package) for package in recipe.packages}
    for name in (*recipe.texts, *recipe.conversations):
        if not (data / name).is_file():
            raise ConfigError(f"training text {data / name} is missing", param="data")
    if recipe.python:
        folders = {"stdlib": Path(sysconfig.get_paths()["stdlib"]), **folders}
    for package, folder in folders.items():
        yield from _python(package, folder)
    for name in recipe.texts:
        yield from (Document(name, data / name, name, part) for part in _paragraphs(_read(data / name)))
    for name in recipe.conversations:
        for turns in _conversations(data / name):
            for _ in range(recipe.repeat_conversations):
                yield Document(name, data / name, name, chatml(turns))


def chatml(turns: list[tuple[str, str]]) -> str:
    """A conversation as the bundled chat template writes it."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def conversation(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The turns of one row of any of the data sets we know, told apart by their fields; empty if there is nothing to learn from."""
    if "prompt" in row and isinstance(row["prompt"], dict):
        return _first_branch(row["prompt"])
    for key in ("conversations", "messages", "turns", "utterances"):
        if isinstance(row.get(key), list):
            return [_turn(t) for t in row[key]]
    if row.get("instances"):
        one = row["instances"][0]
        return _pair("\n".join(filter(None, (row["instruction"], one.get("input")))), one.get("output"))
    question = row.get("instruction") or row.get("question")
    answer = row.get("output") or row.get("response") or row.get("sql") or row.get("query")
    return _pair("\n".join(filter(None, (question, row.get("input")))), answer)


def _pair(question: str, answer: str | None) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)] if question and answer else []


def _turn(turn: Any) -> tuple[str, str]:
    if isinstance(turn, dict):
        role, text = turn.get("from") or turn.get("role") or "user", turn.get("value") or turn.get("content") or ""
    else:
        role, text = turn
    return ROLES.get(role, role), str(text)


def _first_branch(node: dict[str, Any] | None) -> list[tuple[str, str]]:
    turns = []
    while node:
        turns.append((ROLES.get(node["role"], node["role"]), node["text"]))
        node = next(iter(node.get("replies") or ()), None)
    return turns if len(turns) > 1 else []


def _conversations(file: Path) -> Iterator[list[tuple[str, str]]]:
    for line in _read(file).splitlines():
        turns = conversation(json.loads(line)) if line.strip() else []
        if turns:
            yield turns


def _read(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except OSError as error:
        raise ConfigError(f"training text {file} cannot be read: {error}", param="data") from None
    return raw.decode("utf-8", errors="replace")


def _paragraphs(text: str) -> Iterator[str]:
    """Pieces of a few thousand characters cut at empty lines, so that validation can be held out by document."""
    held = ""
    for part in text.split("\n\n"):
        held += part + "\n\n"
        if len(held) >= _PARAGRAPH_CHARS:
            yield held
            held = ""
    if held.strip():
        yield held


def _python(source: str, folder: Path) -> Iterator[Document]:
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if TEST_FOLDERS.isdisjoint(inside.parts):
            text = file.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(source, file, f"{source}/{inside.as_posix()}", text)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"package {package} is not installed, but the recipe trains on it; pass --without-packages", param="packages")
    return Path(next(iter(spec.submodule_search_locations)))
