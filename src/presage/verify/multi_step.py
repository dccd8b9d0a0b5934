"""Multi-step speculative sampling (Miao et al., "SpecInfer", ASPLOS 2024) for token trees, children drawn independently, duplicates kept.

The paper judges the children of a node in an order picked at random; any order fixed without looking at their tokens is as exact, and draw
order is what ``rejection`` uses.

A grammar prunes sampled children for what they are, which would bias the ratio test. It stays exact because each proposal is taken as what
it is then: a draw from q restricted to ids that the target allows, made or not by a coin that does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from presage.core.types import Floats
from presage.execute.sampling.noise import RESIDUAL
from presage.verify.rejection import Rejection, accept_probability, residual

Trial = tuple[int, int, int]


def allowed(q: Floats, p: Floats) -> Floats:
    """The proposal ``q`` [V] given that the target ``p`` [V] allows what was drawn; all 0 if it allows none."""
    some = np.where(p > 0, q, 0.0)
    total = float(some.sum())
    return some / total if total > 0 else some


class MultiStep(Rejection):
    """Recursive rejection with replacement. Several models: one trial per proposal, each with its own row of ``draft.q``."""

    def _decide(self, rows: Any, noise: Any, span: int, node: int, trials: list[Trial], q: Floats | None) -> tuple[int, int | None]:
        if q is None or not trials:
            return super()._decide(rows, noise, span, node, trials, q)
        here = np.array([span], np.int32), np.array([node], np.int32)
        p = rows.probs(*here)[0]
        if span in rows.failed:
            return -1, None
        depth = int(rows.depth(*here)[0])
        for i, (child, token, proposal) in enumerate(self._proposals(trials, p, q)):
            if noise.uniform(span, depth, index=i) < accept_probability(p, token, proposal):
                return token, child
            p = residual(p, token, proposal)
        return noise.choose(p, span, depth, RESIDUAL), None

    def _proposals(self, trials: list[Trial], p: Floats, q: Floats) -> Iterator[tuple[int, int, Floats | None]]:
        """(child, token, what the token was drawn from or None for a point mass) of the trials that the target ``p`` allows."""
        for child, token, row in trials:
            if p[token] > 0:
                yield child, token, None if row < 0 else allowed(q[row], p)
