"""Speculation in a simulation: the engine's own drafters where contents are known, an assumed acceptance rate where they are not."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.plan import Draft, Facts, Grants, StepDone, StepPlan
from presage.core.protocols import Drafter, EngineView, LatencyModel
from presage.core.types import Floats, Ints
from presage.draft.parts import chosen, parts
from presage.draft.registry import make_drafter

TOKENS = 4


class Assumed(Drafter):
    """A drafter for traces without contents: chains of ``tokens`` ids, whose k-th comes true with ``rate`` ** k (``oracle.LawOracle`` draws)."""

    def __init__(self, tokens: int, rate: float) -> None:
        self.tokens, self.rate = tokens, rate

    def hint(self, view: EngineView) -> Ints:
        """As many for everyone."""
        return np.full(view.table.capacity, self.tokens, np.int32)

    def propose(self, view: EngineView, g: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """Chains as long as granted. No pass of its own: its cost is ``Drafting``'s."""
        draft = Draft.chains([[1] * n for n in g.draft.tolist()])
        draft.prob[:] = self.rate ** (draft.depth.astype(np.float64))
        return draft
        yield  # a generator, as the protocol wants


class Drafting:
    """A latency model plus ``seconds`` of drafting in every step that verifies drafts."""

    def __init__(self, inner: LatencyModel, seconds: float) -> None:
        self.inner, self.seconds = inner, seconds
        self.version = f"{getattr(inner, 'version', '')} + {1e3 * seconds:g} ms of drafting"

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2]; drafting takes no energy of its own."""
        out = self.inner.predict(features)
        out[:, 0] += np.where(features[:, 4] > 0, self.seconds, 0.0)
        return out

    def observe(self, facts: Facts) -> None:
        """Passed on."""
        self.inner.observe(facts)


def drafting(config: EngineConfig, vocab_size: int, rate: float | None = None) -> dict[str, Any]:
    """A loop's share of speculation as the engine wires it, for one replica; empty without a drafter.

    ``rate``: acceptance per drafted token to assume instead of drafting from contents. Raises ConfigError for drafters that need a model.
    """
    found = chosen(config)
    if found is None:
        return {}
    if rate is None:
        return parts(found, make_drafter(found.drafter, found.settings, vocab_size=vocab_size))
    if not 0 <= rate < 1:
        raise ConfigError(f"an acceptance rate is at least 0 and below 1, got {rate}", param="acceptance_rate")
    return parts(found, Assumed(int(found.settings.get("num_speculative_tokens", TOKENS)), rate))
