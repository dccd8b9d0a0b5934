"""A forced function: the output is constrained to its parameters, so all of it is the arguments."""

from __future__ import annotations

from presage.serve.tools.base import ToolParser


class NamedParser(ToolParser):
    """Every character is arguments of the one call ``name``."""

    def __init__(self, name: str) -> None:
        super().__init__(frozenset({name}))
        self.forced = name

    def start(self) -> bool:
        """State: the call opens with the first visible character."""
        if self.index < 0:
            if not self.skip_space():
                return False
            self.begin(self.forced)
        self.arguments(self.buf)
        self.buf = ""
        return False
