"""What a step costs outside the model: the loop's own work, and drafting, whoever drafts. Learnt from the gaps between steps.

A model drafter's passes and a host drafter's calls both lie between one step's end and the next one's start, so the gap prices either:
a constant, a constant for drafting at all, a price per drafted request and one per level of the longest draft.
"""

from __future__ import annotations

import numpy as np

from presage.core.plan import Facts
from presage.draft.length.regression import Regression

PRIOR = (1e-6, 1e-6, 5e-5, 5e-5)


class Overhead:
    """``seconds(requests, depth)`` between two steps when ``requests`` slots draft up to ``depth`` deep. Idle time is not counted."""

    def __init__(self) -> None:
        self._line = Regression(list(PRIOR), weight=0.05, keep=0.98)
        self._price: list[float] = self._line.theta.tolist()
        self._ended: float | None = None

    def seconds(self, requests: int, depth: int) -> float:
        """Predicted gap, rounded to 1 microsecond."""
        a, b, c, d = self._price
        return round(a * depth + b * requests + (c if requests else 0.0) + d, 6)

    @property
    def per_request(self) -> float:
        """Seconds one more drafted request adds."""
        return self._price[1]

    @property
    def per_level(self) -> float:
        """Seconds one more level of depth adds."""
        return self._price[0]

    def observe(self, facts: Facts) -> None:
        """One finished step: the gap before it."""
        ended, self._ended = self._ended, facts.done.t1
        if ended is None or facts.plan.features[2] == 0.0:
            return  # nobody was decoding, so the engine may have been waiting for work
        asked = facts.grants.draft
        requests = int(np.count_nonzero(asked))
        depth = int(asked.max()) if requests else 0
        guess = self.seconds(requests, depth)
        # A first call that compiles something must not scare the policy off for good.
        gap = min(max(facts.done.t0 - ended, 1e-6), 8.0 * guess + 1e-3)
        # Where inputs never vary the first one gets the blame: a wrongly blamed depth is soon varied, a wrongly blamed constant never.
        self._line.update(np.array([float(depth), float(requests), float(requests > 0), 1.0]), gap)
        self._price = self._line.theta.tolist()
