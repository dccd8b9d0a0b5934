"""Rejection on trees whose siblings were drawn without replacement (Chen et al., "Sequoia", 2024).

A drafter draws a child from q, takes it out of q, normalises, and draws the next; ``taken_out`` is that step. The rule judges the children
in draw order, each against the q it was really drawn from, so a token that was rejected is not tried again: at low temperature more is
accepted than with replacement.
"""

from __future__ import annotations

from collections.abc import Iterator

from presage.core.types import Floats
from presage.verify.rejection import Rejection, Trial, allowed


def taken_out(q: Floats, tried: list[int]) -> Floats:
    """The proposal after the ids ``tried`` were drawn from ``q`` [V]: they are 0, the rest is normalised.

    Where nothing of ``q`` is left it is uniform over the ids that were not tried; all 0 once every id was.
    """
    left = q.copy()
    left[tried] = 0.0
    if left.sum() <= 0:
        left[:] = 1.0
        left[tried] = 0.0
    return left / max(float(left.sum()), 1.0e-300)


class WithoutReplacement(Rejection):
    """As ``rejection``, with ``trial_q`` naming the row of ``draft.q`` that a node's children were drawn from one after the other.

    Point masses (-1) and children of several drafters, each with a row of its own, may be mixed.
    """

    def _proposals(self, trials: list[Trial], p: Floats, q: Floats | None) -> Iterator[tuple[int, int, Floats | None]]:
        tried = dict[int, list[int]]()
        for child, token, row in trials:
            if row < 0 or q is None:
                yield child, token, None
                continue
            gone = tried.setdefault(row, [])
            if p[token] > 0:
                yield child, token, allowed(taken_out(q[row], gone), p)
            gone.append(token)
