"""Counts of what speculation did: by place in the draft and by drafter."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.core.plan import StepDone, StepPlan
from presage.draft.sources import SOURCES

PLACES = 64


class SpeculationStats:
    """``drafted`` and ``accepted`` by place (depth - 1; the last counts all deeper ones) and by source."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.drafted, self.accepted = np.zeros(PLACES, np.int64), np.zeros(PLACES, np.int64)
        self.drafted_by, self.accepted_by = np.zeros(len(SOURCES), np.int64), np.zeros(len(SOURCES), np.int64)

    def add(self, plan: StepPlan, done: StepDone) -> None:
        """One finished step that verified drafts."""
        draft = plan.draft
        counts = np.diff(done.path_off)
        taken = np.repeat(draft.offset[:-1], counts) + done.path
        for nodes, at, by in ((slice(None), self.drafted, self.drafted_by), (taken, self.accepted, self.accepted_by)):
            at += np.bincount(np.minimum(draft.depth[nodes] - 1, PLACES - 1), minlength=PLACES)
            if len(draft.source):
                by += np.bincount(np.minimum(draft.source[nodes], len(SOURCES) - 1), minlength=len(SOURCES))

    def summary(self) -> dict[str, Any]:
        """As ``Stats`` reports them: lists by place up to the deepest draft, and counts by drafter."""
        deepest = int(np.flatnonzero(self.drafted)[-1]) + 1 if self.drafted.any() else 0
        return {
            "spec_num_accepted_tokens_per_pos": self.accepted[:deepest].tolist(),
            "spec_num_draft_tokens_per_pos": self.drafted[:deepest].tolist(),
            "spec_num_draft_tokens_by_method": {n: int(c) for n, c in zip(SOURCES, self.drafted_by) if c},
            "spec_num_accepted_tokens_by_method": {n: int(c) for n, c in zip(SOURCES, self.accepted_by) if c},
        }
