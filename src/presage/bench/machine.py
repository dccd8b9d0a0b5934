"""A machine of known speed under a replay: what steps take there, and what length policies are shown of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from presage.core.plan import Draft, Facts, Grants, NewIds, StepDone, StepPlan
from presage.core.protocols import EngineView
from presage.core.table import Table
from presage.core.types import EMPTY, Longs
from presage.draft.length.scan import FEATURES, step_features

GAP = 5e-5
"""Seconds between two steps: the machine's own loop."""


@dataclass(slots=True, frozen=True)
class Machine:
    """A step takes ``step_ms`` and ``row_ms`` for each of its rows: one a request, one a draft id."""

    step_ms: float = 10.0
    row_ms: float = 0.2

    def seconds(self, rows: int) -> float:
        """Of one step."""
        return 1e-3 * (self.step_ms + self.row_ms * rows)


class _Roomy:
    """A ledger with more blocks than anybody asks for."""

    free: Longs = np.array([1 << 40])


def view_of(slots: int) -> EngineView:
    """What policies read of an engine with ``slots`` requests, all decoding."""
    view = EngineView()
    view.table, view.ledger, view.free = Table(slots), _Roomy(), _Roomy.free  # type: ignore[assignment]
    view.gap, view.queue = np.ones(view.table.capacity, np.int32), EMPTY
    view.now, view.step, view.layers, view.latency, view.max_num_seqs = 0.0, 0, 1, None, slots
    return view


def facts_of(view: EngineView, grants: Grants, draft: Draft, new: NewIds, paths: list[list[int]], begun: float, ended: float) -> Facts:
    """The facts of a step that ran from ``begun`` to ``ended`` and accepted ``paths``."""
    n, nodes = len(grants), np.diff(draft.offset).astype(np.int32)
    start, rows = view.computed[grants.slot], grants.tokens + nodes
    f = np.empty(FEATURES)
    step_features(start, grants.tokens, np.ones(n, np.bool_), 1.0, f)
    f[0], f[4], f[5], f[6], f[7] = rows.sum(), nodes.sum(), rows.sum(), (start + rows).sum(), (rows * (start + rows)).sum()
    plan = StepPlan(
        view.step, 0, grants.slot, start, grants.tokens, nodes, grants.layer0, grants.layer1, np.ones(n, np.uint8),
        np.concatenate([[0], np.cumsum(rows)]).astype(np.int32), EMPTY, EMPTY, EMPTY, (), draft, features=f,
    )  # fmt: skip
    path_off = np.concatenate([[0], np.cumsum([len(p) for p in paths])]).astype(np.int32)
    gap = GAP * view.step
    done = StepDone(view.step, begun + gap, ended + gap, new.off, new.ids, path_off, np.array([i for p in paths for i in p], np.int32))
    return Facts(plan, grants, draft, done, new)
