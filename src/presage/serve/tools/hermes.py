"""Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number, anywhere in the text."""

from __future__ import annotations

from presage.serve.tools.base import Piece, ToolParser, partial

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """Calls between tags; a tag around something that is no call stays in the content."""

    def start(self) -> bool:
        """State: content until the next opening tag."""
        before, tag, after = self.buf.partition(OPEN)
        if tag:
            self.content(before)
            self.buf = after
            self.open_call(OPEN)
            return True
        keep = partial(self.buf, OPEN)
        cut = len(self.buf) - keep
        self.content(self.buf[:cut])
        self.buf = self.buf[cut:]
        return False

    def failed(self) -> bool:
        """State: back to looking for tags."""
        self.state = self.start
        return True

    def closed(self) -> bool:
        """State: expects the closing tag, which models sometimes forget."""
        if not self.skip_space():
            return False
        if CLOSE.startswith(self.buf) and self.buf != CLOSE:
            return False
        self.buf = self.buf.removeprefix(CLOSE)
        self.state = self.start
        return True

    def finish(self) -> list[Piece]:
        """As the base, but half a closing tag is no content."""
        if self.state == self.closed:
            self.buf = ""
        return super().finish()
