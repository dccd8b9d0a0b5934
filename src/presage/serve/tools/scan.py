"""Incremental scanning of JSON that a model is still writing, one character at a time and independent of how the text is cut."""

from __future__ import annotations

import json

_SPACE = " \t\r\n"
_ENDS = ",}]" + _SPACE


class ValueScanner:
    """Finds the end of one JSON value. ``done`` once the value is whole; a number or word ends before the next delimiter."""

    def __init__(self) -> None:
        self.kind, self.done = "", False
        self._depth, self._string, self._escape = 0, False, False

    def feed(self, text: str, at: int = 0) -> int:
        """Index after the last character of ``text[at:]`` that belongs to the value."""
        while at < len(text) and not self.done:
            char = text[at]
            if not self.kind:
                self.kind = char if char in '{["' else "scalar"
            if self.kind == "scalar" and char in _ENDS:
                self.done = True
                return at
            self._take(char)
            at += 1
        return at

    def _take(self, char: str) -> None:
        if self._string:
            if self._escape:
                self._escape = False
            elif char == "\\":
                self._escape = True
            elif char == '"':
                self._string = False
                self.done = self._depth == 0
        elif char == '"':
            self._string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth == 0


class CallScanner:
    """Reads one ``{"name": ..., "arguments": {...}}`` object and hands out the name, then the arguments' own text as it comes.

    ``known`` restricts names; None allows all. ``failed`` means that the text is no call (nothing was handed out): ``raw`` gives it back.
    Arguments written before the name wait for it; arguments double-encoded as a string are decoded; absent or null ones become ``{}``.
    """

    def __init__(self, known: frozenset[str] | None = None) -> None:
        self.known, self.name, self.raw = known, "", ""
        self.done, self.failed = False, False
        self._state, self._key, self._text = "open", "", ""
        self._value: ValueScanner | None = None
        self._held, self._wrote = "", False
        self._pieces: list[str] = []

    def feed(self, text: str) -> int:
        """Number of characters consumed; the rest belongs to what follows the object."""
        at = 0
        while at < len(text) and not self.done and not self.failed:
            start = at
            at = self._read_value(text, at) if self._value is not None else self._between(text, at)
            if not self.name:
                self.raw += text[start:at]
        return at

    def take(self) -> str:
        """Arguments text since the last call."""
        out = "".join(self._pieces)
        self._pieces.clear()
        return out

    def _between(self, text: str, at: int) -> int:
        char = text[at]
        if char in _SPACE:
            return at + 1
        expected = {"open": "{", "colon": ":", "comma": ",}", "key": '"}'}.get(self._state, char)
        if char not in expected:
            self._close()
            return at if self.done else at + 1
        return self._punctuation(char, at)

    def _punctuation(self, char: str, at: int) -> int:
        if char == "}" and self._state in ("key", "comma"):
            self._close()
        elif self._state in ("key", "value"):
            self._value, self._text = ValueScanner(), ""
            return at
        else:
            self._state = {"open": "key", "colon": "value", "comma": "key"}[self._state]
        return at + 1

    def _read_value(self, text: str, at: int) -> int:
        value = self._value
        if value is None:
            return at
        end = value.feed(text, at)
        piece = text[at:end]
        # Objects and lists stream as they are written; a string must be whole before it can be decoded.
        live = self._state == "value" and self._key in ("arguments", "parameters") and value.kind in ("{", "[")
        if live:
            self._write(piece)
        else:
            self._text += piece
        if value.done:
            self._value = None
            self._finish_value(live)
        return end

    def _finish_value(self, live: bool) -> None:
        if self._state == "key":
            self._key, self._state = str(_decoded(self._text)), "colon"
            return
        self._state = "comma"
        if self._key == "name":
            self._named(_decoded(self._text))
        elif self._key in ("arguments", "parameters") and not live:
            value = _decoded(self._text)
            self._write(value if isinstance(value, str) else "{}" if value is None else self._text)

    def _named(self, name: object) -> None:
        if not isinstance(name, str) or not name or self.name or (self.known is not None and name not in self.known):
            # A second name or an unknown one: once handed out, a call cannot be taken back.
            self.failed = not self.name
            return
        self.name = name
        held, self._held = self._held, ""
        if held:
            self._write(held)

    def _write(self, piece: str) -> None:
        if not self.name:
            self._held += piece
        elif piece:
            self._wrote = True
            self._pieces.append(piece)

    def _close(self) -> None:
        if not self.name:
            self.failed = True
            return
        self.done = True
        if not self._wrote:
            self._write("{}")


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
