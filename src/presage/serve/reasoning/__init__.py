"""Reasoning parsers by name."""

from __future__ import annotations

from presage.core.errors import ConfigError
from presage.serve.reasoning.think import ThinkParser

PARSERS = ("deepseek_r1", "qwen3")


def check(name: str) -> None:
    """Raise ConfigError if there is no such parser."""
    if name not in PARSERS:
        raise ConfigError(f"unknown reasoning_parser {name!r}; known: {', '.join(PARSERS)}", param="reasoning_parser")


def reasoning_parser(name: str, prompt: str) -> ThinkParser:
    """A parser for one answer. DeepSeek-R1 always reasons first; Qwen 3 does if it, or the end of ``prompt``, opens the tag."""
    check(name)
    return ThinkParser(inside=name == "deepseek_r1" or prompt.rstrip().endswith("<think>"))


__all__ = ["PARSERS", "ThinkParser", "check", "reasoning_parser"]
