"""Drafters by name, imported when asked for; other packages add theirs through entry points of group ``presage.drafters``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from presage.core.checked import checked
from presage.core.errors import ConfigError
from presage.core.protocols import Drafter

GROUP = "presage.drafters"
DRAFTERS = {
    "suffix": "presage.draft.suffix:SuffixDrafter",
    "ngram": "presage.draft.ngram:NgramDrafter",
    "lookahead": "presage.draft.lookahead:LookaheadDrafter",
    "model": "presage.draft.model:ModelDrafter",
    "early_exit": "presage.draft.early_exit:EarlyExitDrafter",
    "speed": "presage.draft.speed:SpeedDrafter",
    "grammar": "presage.draft.grammar:GrammarDrafter",
    "hybrid": "presage.draft.hybrid:HybridDrafter",
}
ALIASES = {"[ngram]": "ngram", "draft_model": "model"}  # vLLM's spellings


def names() -> tuple[str, ...]:
    """Methods that ``make_drafter`` knows, plug-ins included."""
    return tuple(sorted(set(DRAFTERS) | {e.name for e in entry_points(group=GROUP)}))


def make_drafter(method: str, config: Mapping[str, Any] | None = None, **context: Any) -> Drafter:
    """The drafter of that name, made with the settings of ``config`` (its keyword arguments, vLLM's names where the meaning is the same).

    ``context``: what the engine can offer (a model, the vocabulary's size, ...); each drafter takes what its constructor names. A hybrid's
    ``drafters`` is a list of methods, or of such configurations with their ``method``; its ``num_speculative_tokens`` is every part's that
    has none. Raises ConfigError for unknown methods and settings.
    """
    settings = {k: v for k, v in (config or {}).items() if k != "method"}
    kind = _kind(ALIASES.get(method, method))
    if "drafters" in settings:
        common = {k: settings.pop(k) for k in ("num_speculative_tokens",) if k in settings}
        if not isinstance(settings["drafters"], list):
            raise ConfigError(f"drafter {method!r}: drafters must be a list", param="drafters")
        settings["drafters"] = [_part(part, common, context) for part in settings["drafters"]]
    takes = inspect.signature(kind).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    unknown = [] if anything else sorted(name for name in settings if name not in takes or name in context)
    if unknown:
        known = ", ".join(name for name in takes if name not in context)
        raise ConfigError(f"drafter {method!r} has no setting {', '.join(unknown)}; known: {known}", param=unknown[0])
    checked(kind, {k: v for k, v in settings.items() if k != "drafters"}, f"drafter {method!r}")
    settings |= {k: v for k, v in context.items() if k in takes and k not in settings}
    missing = [n for n, p in takes.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in settings]
    if missing:
        raise ConfigError(f"drafter {method!r} needs {', '.join(missing)}", param=missing[0])
    drafter: Drafter = kind(**settings)
    return drafter


def _part(part: str | Mapping[str, Any], common: Mapping[str, Any], context: Mapping[str, Any]) -> Drafter:
    """A drafter of a hybrid, ``common`` settings where it has none of its own."""
    own = {"method": part} if isinstance(part, str) else part
    if not isinstance(own, Mapping) or "method" not in own:
        raise ConfigError(f"a drafter of a hybrid needs a method; known: {', '.join(names())}", param="method")
    return make_drafter(own["method"], {**common, **own}, **context)


def _kind(method: str) -> Any:
    """The class or factory of a method. Its module is imported here, so an unused drafter costs nothing."""
    where = DRAFTERS | {e.name: e.value for e in entry_points(group=GROUP) if e.name not in DRAFTERS}
    if method not in where:
        raise ConfigError(f"unknown drafter {method!r}; known: {', '.join(names())}", param="method")
    module, _, name = where[method].partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"drafter {method!r} is not part of this installation ({module})", param="method") from None
