"""Llama 3.1-3.3: the whole answer is ``{"name": ..., "parameters": {...}}``, perhaps after ``<|python_tag|>``, several split by ``;``."""

from __future__ import annotations

from presage.serve.tools.base import ToolParser

TAG = "<|python_tag|>"


class Llama3JsonParser(ToolParser):
    """Without a marker any JSON could be meant, so only names of the request's tools make a call; other JSON stays content."""

    special_tokens = True

    def start(self) -> bool:
        """State: decides on the first visible characters."""
        stripped = self.buf.lstrip()
        if not stripped or (TAG.startswith(stripped) and stripped != TAG):
            return False
        lead = self.buf[: len(self.buf) - len(stripped)]
        if stripped.startswith(TAG):
            lead, stripped = lead + TAG, stripped.removeprefix(TAG)
        # The decision is final: a brace later in an answer is just a brace.
        elif stripped[0] != "{":
            self.state = self.plain
            return True
        self.buf = stripped
        self.open_call(lead, self.names or None)
        return True

    def closed(self) -> bool:
        """State: another call, or the rest as content."""
        if not self.skip_space():
            return False
        if self.buf[0] in ";,":
            mark, self.buf = self.buf[0], self.buf[1:]
            self.open_call(mark, self.names or None)
        else:
            self.state = self.plain
        return True

    def failed(self) -> bool:
        """State: it was an ordinary answer."""
        self.state = self.plain
        return True
