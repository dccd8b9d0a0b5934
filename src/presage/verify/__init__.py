"""Acceptance rules, one file each: which drafted tokens stand, and which token comes after them.

A rule has traits ``lossless`` (tokens follow the target exactly) and ``seed_stable`` (a seed's tokens do not depend on drafts or load).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from presage.core.errors import ConfigError
from presage.core.protocols import AcceptanceRule

RULES = {
    "keyed": "Keyed",
    "greedy": "Greedy",
    "rejection": "Rejection",
    "without_replacement": "WithoutReplacement",
    "block": "Block",
    "typical": "Typical",
    "bild": "Bild",
}

ALIASES = {"multi_step": "rejection"}
"""SpecInfer's multi-step speculative sampling is rejection with several drafts per node."""


def names() -> tuple[str, ...]:
    """Names that ``get`` knows."""
    return tuple(RULES)


@lru_cache(64)
def get(name: str) -> AcceptanceRule:
    """The rule of that name; rules keep no state. Lossy rules take dials: ``bild:fallback_threshold=0.8,rollback_threshold=3``.

    Raises ConfigError listing the names, or naming a dial that the rule does not have.
    """
    base, _, dials = name.partition(":")
    base = ALIASES.get(base, base)
    if base not in RULES:
        raise ConfigError(f"unknown acceptance rule {base!r}; known: {', '.join(names())}", param="accept")
    kind = getattr(import_module(f"presage.verify.{base}"), RULES[base])
    try:
        rule: AcceptanceRule = kind(**{k: float(v) for k, _, v in (d.partition("=") for d in dials.split(",") if d)})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"acceptance rule {name!r}: {error}", param="accept") from None
    return rule
