"""Tool-call parsers by name, and the constraint that forces a call."""

from __future__ import annotations

from presage.core.errors import ConfigError
from presage.serve.tools.base import Piece, ToolDelta, ToolParser
from presage.serve.tools.hermes import HermesParser
from presage.serve.tools.llama3_json import Llama3JsonParser
from presage.serve.tools.mistral import MistralParser
from presage.serve.tools.pythonic import PythonicParser

PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}


def tool_parser(name: str) -> type[ToolParser]:
    """The parser class of a configured name. Errors: ConfigError listing the names."""
    if name not in PARSERS:
        raise ConfigError(f"unknown tool_call_parser {name!r}; known: {', '.join(PARSERS)}", param="tool_call_parser")
    return PARSERS[name]


__all__ = ["PARSERS", "Piece", "ToolDelta", "ToolParser", "tool_parser"]
