"""The loop's share of speculation, the same in the engine, in replays and in simulations: only the drafter differs."""

from __future__ import annotations

from typing import Any

from presage.core.config import EngineConfig
from presage.core.protocols import Drafter
from presage.draft.settings import Speculative, parse_speculative


def chosen(config: EngineConfig) -> Speculative | None:
    """What the configuration asks for; None if it speculates on nothing. Raises ConfigError."""
    found = parse_speculative(config.speculation.speculative_config)
    return found if config.speculation.max_draft_tokens else None


def parts(found: Speculative, drafter: Drafter) -> dict[str, Any]:
    """Keyword arguments of ``Loop``: the drafter, its length policy with what notes requests' wishes, and a model of step times."""
    from presage.draft.length.registry import make_length
    from presage.draft.length.steptime import StepTime

    length = make_length(found.length, rule=found.rule, **found.options)
    wishes = getattr(length, "wishes", None)  # policies of other packages may have none
    return {"drafter": drafter, "length": length, "companions": (wishes,) if wishes is not None else (), "latency": StepTime()}
