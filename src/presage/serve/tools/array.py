"""A JSON array of calls: what ``tool_choice: required`` constrains the output to, and the core of Mistral's format."""

from __future__ import annotations

from presage.serve.tools.base import ToolParser


class ArrayParser(ToolParser):
    """``[{"name": ..., "parameters": {...}}, ...]`` from the first character on."""

    def start(self) -> bool:
        """State: expects the array."""
        return self.array("")

    def array(self, marker: str) -> bool:
        """Enter the array, or give ``marker`` back as content if there is none."""
        stripped = self.buf.lstrip()
        if not stripped:
            return False
        lead = self.buf[: len(self.buf) - len(stripped)]
        if stripped[0] != "[":
            self.content(marker + lead)
            self.buf, self.state = stripped, self.outside
            return True
        self.buf = stripped[1:]
        self.open_call(marker + lead + "[")
        return True

    def closed(self) -> bool:
        """State: between two calls of the array."""
        if not self.skip_space():
            return False
        char, self.buf = self.buf[0], self.buf[1:]
        if char == ",":
            self.open_call(",")
        else:
            self.buf = self.buf if char == "]" else char + self.buf
            self.state = self.outside
        return True

    def failed(self) -> bool:
        """State: the array holds something else."""
        self.state = self.outside
        return True

    def outside(self) -> bool:
        """State: text that is no array."""
        return self.plain()
