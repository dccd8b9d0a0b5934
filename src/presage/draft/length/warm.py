"""Run a copy of a policy over two made-up requests, so that its kernels are compiled or loaded before the first real draft waits for them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from presage.core.plan import Draft, Facts, Grants, NewIds, StepDone, StepPlan
from presage.core.protocols import EngineView, LengthController
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import EMPTY, Longs

REQUESTS = 2


class _Roomy:
    """A ledger with more blocks than anybody asks for."""

    free: Longs = np.array([1 << 30])


def warm(policy: LengthController) -> None:
    """Take a copy of ``policy`` through asking, selecting and observing, with and without targets and binding rules. It learns nothing itself."""
    trial: Any = copy.deepcopy(policy)
    view = EngineView()
    view.table, view.ledger, view.free = Table(8), _Roomy(), _Roomy.free  # type: ignore[assignment]
    for seq in range(REQUESTS):
        view.table.seq[view.table.take()] = seq
    view.known = np.full(view.table.capacity, 10, np.int32)
    view.computed, view.gap = view.known - 1, np.ones(view.table.capacity, np.int32)
    view.ready, view.queue = np.arange(REQUESTS, dtype=np.int32), EMPTY
    view.step, view.layers, view.now, view.latency = 0, 1, 0.0, None
    for step in range(2):
        if step:
            trial.wishes.open(0, Request(id="bound", prompt=np.arange(3), accept="rejection"))
            trial.wishes.open(1, Request(id="hasty", prompt=np.arange(3), due_each=1.0))
        trial.observe(_step(trial, view, step))


def _step(trial: Any, view: EngineView, step: int) -> Facts:
    """One made-up step in which a draft of two was accepted by half."""
    trial.ask(view, np.full(view.table.capacity, 2, np.int32))
    grants = Grants.of(view.ready, [1] * REQUESTS, 1, draft=[2] * REQUESTS)
    draft = Draft.chains([[0, 0]] * REQUESTS)
    if step:
        draft.trial_node, draft.trial_q = np.array([0], np.int32), np.array([0], np.int32)
    trial.select(view, grants, draft)
    ints = np.arange(3 * REQUESTS + 1, dtype=np.int32)
    path_off, new_off = ints[: REQUESTS + 1], 2 * ints[: REQUESTS + 1]
    plan = StepPlan(
        step, 0, view.ready, view.computed[view.ready], grants.tokens, np.diff(draft.offset).astype(np.int32), grants.layer0, grants.layer1,
        np.ones(REQUESTS, np.uint8), 3 * ints[: REQUESTS + 1], ints[1:], ints[1:], ints[1:], (), draft, features=np.ones(12),
    )  # fmt: skip
    done = StepDone(step, 1.0 + step, 1.5 + step, new_off, ints[: 2 * REQUESTS], path_off, np.zeros(REQUESTS, np.int32))
    return Facts(plan, grants, draft, done, NewIds(view.ready, new_off, done.new, np.zeros(REQUESTS, np.uint8)))
