"""What every tool-call parser is: text in, content and call pieces out, independent of how the text is cut into chunks."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from presage.serve.tools.scan import CallScanner


class ToolDelta(msgspec.Struct, frozen=True):
    """A piece of call ``index``: the first has ``id`` and ``name``, the others add to ``arguments``."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


Piece = str | ToolDelta


def partial(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that may still become ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0


class ToolParser:
    """Base: a buffer and a current state. A state consumes from ``buf`` and returns False when it needs more text.

    White space before a call belongs to the format, so it is held until it is known not to precede one.
    ``special_tokens`` parsers need the text of special tokens. ``names`` are the request's tools.
    """

    special_tokens = False

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self.names, self.buf, self.index = names, "", -1
        self.out: list[Piece] = []
        self.space = ""
        self.scanner = CallScanner()
        self.opened = ""
        self.state: Callable[[], bool] = self.start

    def start(self) -> bool:
        """The first state."""
        return self.plain()

    def feed(self, text: str) -> list[Piece]:
        """Pieces that ``text`` settles."""
        self.buf += text
        while self.buf and self.state():
            pass
        return self.take()

    def finish(self) -> list[Piece]:
        """Pieces left at the end of the text: an unfinished marker or a nameless call turns out to be content."""
        separator = self.opened in (",", ";")  # a further call that was cut off before its name
        unfinished = "" if self.scanner.name or separator else self.opened + self.scanner.raw
        self.content(unfinished + ("" if separator else self.buf))
        self.buf, self.opened = "", ""
        if self.index < 0 and self.space:
            self.out.append(self.space)
        self.space = ""
        return self.take()

    def take(self) -> list[Piece]:
        """Collected pieces, neighbouring ones joined."""
        out: list[Piece] = []
        for piece in self.out:
            last = out[-1] if out else None
            if isinstance(piece, str) and isinstance(last, str):
                out[-1] = last + piece
            elif isinstance(piece, ToolDelta) and isinstance(last, ToolDelta) and not piece.name and piece.index == last.index:
                out[-1] = ToolDelta(last.index, last.id, last.name, last.arguments + piece.arguments)
            else:
                out.append(piece)
        self.out = []
        return out

    def make_id(self) -> str:
        """A fresh call id."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def content(self, text: str) -> None:
        """Text that is no call."""
        text = self.space + text
        body = text.rstrip()
        self.space = text[len(body) :]
        if body:
            self.out.append(body)

    def plain(self) -> bool:
        """State: everything is content."""
        self.content(self.buf)
        self.buf = ""
        return False

    def skip_space(self) -> bool:
        """Drop white space in front; True if text is left."""
        self.buf = self.buf.lstrip()
        return bool(self.buf)

    def open_call(self, opened: str, known: frozenset[str] | None = None) -> None:
        """Expect a JSON call; ``opened`` is the text to give back if there is none."""
        self.scanner, self.opened, self.state = CallScanner(known), opened, self.call

    def call(self) -> bool:
        """State: inside a JSON call."""
        scanner, named = self.scanner, bool(self.scanner.name)
        self.buf = self.buf[scanner.feed(self.buf) :]
        if scanner.name and not named:
            self.begin(scanner.name)
        self.arguments(scanner.take())
        if scanner.failed:
            opened, self.opened = self.opened, ""
            self.content(opened + scanner.raw)
            self.scanner, self.state = CallScanner(), self.failed
            return True
        if scanner.done:
            self.opened, self.state = "", self.closed
        return scanner.done

    def begin(self, name: str) -> None:
        """A call starts."""
        self.index += 1
        # White space between a sentence and its call belongs to the format, not to the answer.
        self.space = ""
        self.out.append(ToolDelta(self.index, self.make_id(), name))

    def arguments(self, text: str) -> None:
        """More arguments of the current call."""
        if text:
            self.out.append(ToolDelta(self.index, arguments=text))

    def failed(self) -> bool:
        """State after text that looked like a call and was none."""
        return self.plain()

    def closed(self) -> bool:
        """State after a whole call."""
        return self.plain()
