"""Acceptance rules, one file each: which drafted tokens stand, and which token comes after them.

A rule has traits ``lossless`` (tokens follow the target exactly) and ``seed_stable`` (a seed's tokens do not depend on drafts or load).
"""

from __future__ import annotations

from importlib import import_module

from presage.core.errors import ConfigError
from presage.core.protocols import AcceptanceRule

RULES = {"keyed": "Keyed", "greedy": "Greedy", "rejection": "Rejection"}


def names() -> tuple[str, ...]:
    """Names that ``get`` knows."""
    return tuple(RULES)


def get(name: str) -> AcceptanceRule:
    """The rule of that name; rules keep no state. Raises ConfigError listing the names."""
    if name not in RULES:
        raise ConfigError(f"unknown acceptance rule {name!r}; known: {', '.join(names())}", param="accept")
    rule: AcceptanceRule = getattr(import_module(f"presage.verify.{name}"), RULES[name])()
    return rule
