"""A thinking budget as a program: if the end-of-thinking id is not out after ``budget`` tokens, it is appended and the answer begins.

The budget forcing of s1 (arXiv 2501.19393), by an injected id: drafts, batching and streaming see an ordinary token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from presage.core.events import Boundary, ChildDone, Command, Inject, Started, Watch


class ThinkingBudget:
    """``budget`` tokens at most (at least 1) before ``end_id``."""

    def __init__(self, budget: int, end_id: int) -> None:
        self.budget, self.end_id = max(1, budget), end_id

    def on(self, event: Boundary | ChildDone | Started) -> Iterator[Command]:
        """Watch the budget; close the thinking there if the model has not."""
        if isinstance(event, Started):
            yield Watch(event.slot, self.budget)
        elif isinstance(event, Boundary) and not event.finish and self.end_id not in event.ids.tolist():
            yield Inject(event.slot, np.array([self.end_id], np.int32))
