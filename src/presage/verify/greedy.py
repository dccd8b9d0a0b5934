"""Greedy verification: a draft is accepted while it is the target's most likely token, ties to the lower id."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.core.errors import StepFailed
from presage.core.plan import Draft, Verdict
from presage.verify.walk import walk


class Greedy:
    """The keyed rule for requests at temperature 0, and for them only."""

    lossless = True
    seed_stable = True

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict:
        """As ``keyed``. Raises StepFailed naming the slots of requests with a temperature: taking their argmax would not be lossless."""
        hot = rows.slot[rows.spans[rows.sampled(rows.spans)]]
        if len(hot):
            slots = np.unique(hot).tolist()
            raise StepFailed(f"rule greedy judges requests at temperature 0 only; slots {slots} are sampled (use keyed)", slots=slots)
        return walk(rows, draft, noise)
