"""The same number of drafts for everybody, or a number by batch size, as vLLM's dynamic speculation table has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import Draft, Facts, Grants, Keep
from presage.core.protocols import EngineView
from presage.core.types import Ints
from presage.draft.length.ready import decoding, within
from presage.draft.length.wishes import UNCAPPED, Wishes


class Fixed:
    """``num_speculative_tokens`` nodes per request and step.

    ``table`` [[low, high, k], ...] overrides it by the number of decoding requests (inclusive bounds; outside of all of them: the default).
    A request's own ``num_speculative_tokens`` replaces both: it may be larger, too. Raises ConfigError for negative or overlapping rows.
    """

    def __init__(self, num_speculative_tokens: int = 4, table: Sequence[Sequence[int]] = (), rule: str = "keyed") -> None:
        self.k, self.table = num_speculative_tokens, sorted(tuple(int(x) for x in row) for row in table)
        bad = [row for row in self.table if len(row) != 3 or row[0] > row[1] or min(row) < 0]
        if num_speculative_tokens < 0 or bad:
            got = bad or num_speculative_tokens
            raise ConfigError(f"draft lengths must be at least 0 and table rows [low, high, length], got {got}", param="length")
        if any(a[1] >= b[0] for a, b in zip(self.table, self.table[1:])):
            raise ConfigError("rows of the draft length table overlap", param="length")
        self.wishes = Wishes(rule)

    def ask(self, view: EngineView, hint: Ints) -> Ints:
        """[C] nodes worth drafting for each slot; 0 for slots that do not decode."""
        self.wishes.fit(len(hint))
        out = np.zeros(len(hint), np.int32)
        slots = decoding(view, hint)
        own = self.wishes.cap[slots]
        k = next((row[2] for row in self.table if row[0] <= len(slots) <= row[1]), self.k)
        out[slots] = np.minimum(hint[slots], np.where(own < UNCAPPED, own, k))
        return out

    def select(self, view: EngineView, grants: Grants, draft: Draft) -> Keep:
        """Everything that was granted."""
        return Keep(within(grants, draft), np.zeros(len(grants), bool))

    def observe(self, facts: Facts) -> None:
        """Nothing is learnt."""
