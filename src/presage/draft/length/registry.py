"""Length policies by name; other packages add theirs through the entry point group ``presage.lengths``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from presage.core.checked import checked
from presage.core.errors import ConfigError
from presage.core.protocols import LengthController
from presage.draft.length.warm import warm

LENGTHS = {
    "fixed": "presage.draft.length.fixed:Fixed",
    "goodput": "presage.draft.length.goodput:Goodput",
    "marginal": "presage.draft.length.marginal:Marginal",
}


def make_length(name: str, **options: Any) -> LengthController:
    """The policy called ``name`` with its options. Raises ConfigError for an unknown name (it lists the known ones) or option."""
    known = dict(LENGTHS) | {e.name: e.value for e in entry_points(group="presage.lengths")}
    if name not in known:
        raise ConfigError(f"unknown draft length policy {name!r}; known: {', '.join(sorted(known))}", param="length")
    module, _, attribute = known[name].partition(":")
    policy = getattr(import_module(module), attribute)
    if "rule" in options and name not in LENGTHS and "rule" not in signature(policy).parameters:
        options.pop("rule")  # the engine offers it to all; policies that never drop drafts need not know it
    checked(policy, options, f"draft length policy {name!r}")
    try:
        made: LengthController = policy(**options)
    except TypeError as error:
        raise ConfigError(f"draft length policy {name!r}: {error}", param="length") from None
    if name in LENGTHS:
        warm(made)
    return made
