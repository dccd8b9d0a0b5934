"""Pythonic calls (Llama 3.2, Llama 4): the whole answer is a list of calls, ``[f(a=1), g(b="x")]``."""

from __future__ import annotations

import ast
import json
from typing import Any

from presage.serve.tools.base import ToolParser

MAX_CHARS = 1 << 16
_WORDS = {"true": True, "false": False, "null": None}


class PythonicParser(ToolParser):
    """Collects the list until its bracket closes, then reads it with Python's own grammar; nothing is executed."""

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        super().__init__(names)
        self.at, self.depth, self.quote, self.escape = 0, 0, "", False

    def start(self) -> bool:
        """State: a bracket followed by a name opens a list of calls."""
        stripped = self.buf.lstrip()
        inner = stripped[1:].lstrip()
        if not stripped or (stripped[0] == "[" and not inner):
            return False
        if stripped[0] != "[" or not (inner[0].isalpha() or inner[0] == "_"):
            self.state = self.plain
        else:
            self.content(self.buf[: len(self.buf) - len(stripped)])
            self.buf, self.state = stripped, self.inside
        return True

    def inside(self) -> bool:
        """State: looks for the closing bracket outside of strings."""
        # The position is kept between chunks, or a long list would be read again for every token.
        while self.at < len(self.buf) and self.at < MAX_CHARS:
            char = self.buf[self.at]
            self.at += 1
            if self._step(char):
                self._read(self.buf[: self.at])
                self.buf, self.state = self.buf[self.at :], self.plain
                return True
        if self.at >= MAX_CHARS:
            self.state = self.plain
            return True
        return False

    def _step(self, char: str) -> bool:
        if self.quote:
            if self.escape:
                self.escape = False
            elif char == "\\":
                self.escape = True
            elif char == self.quote:
                self.quote = ""
        elif char in "\"'":
            self.quote = char
        elif char in "[({":
            self.depth += 1
        elif char in "])}":
            self.depth -= 1
        return self.depth == 0

    def _read(self, text: str) -> None:
        try:
            calls = _calls(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            self.content(text)
            return
        for name, arguments in calls:
            self.begin(name)
            self.arguments(arguments)


def _calls(node: ast.expr) -> list[tuple[str, str]]:
    if not isinstance(node, ast.List) or not node.elts:
        raise ValueError("not a list of calls")
    out = []
    for call in node.elts:
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("not a call with named arguments")
        values = {str(k.arg): _literal(k.value) for k in call.keywords}
        out.append((ast.unparse(call.func), json.dumps(values, ensure_ascii=False, allow_nan=False)))
    return out


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.Dict):
        return {str(_literal(k)): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(v) for v in node.elts]
    # Literals only: names, calls and operators raise, so nothing of the model's text is ever run.
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("not a JSON value")
    return value
