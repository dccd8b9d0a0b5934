"""Is a policy's plan legal? Checked for every plan, so that a broken policy costs a step and never a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from presage.core.errors import PolicyError
from presage.core.plan import Budget, Grants
from presage.core.protocols import EngineView, KVCache
from presage.engine.kernels import check_plain, reach
from presage.engine.staircase import legal

_REASONS = {
    1: "a grant without tokens, or with more draft nodes than were asked for",
    2: "a slot that cannot be granted now, or that was granted twice",
    3: "more tokens granted than a request lacks",
    4: "more tokens granted than the budget allows",
}


def check_grants(g: Grants, view: EngineView, budget: Budget, lanes: Sequence[KVCache]) -> None:
    """Raises PolicyError unless: rows within budget, slots grantable, tokens within the gap, drafts within ask, blocks within the ledger."""
    if not len(g):
        return
    t = view.table
    code = check_plain(
        g.slot, g.tokens, g.draft, g.start, g.lane, g.layer0, g.layer1, view.layers, t.ask, view.gap, t.lead, view.ready, view.queue,
        t.capacity, budget.tokens,
    )  # fmt: skip
    if code > 0:
        raise PolicyError(_REASONS[code])
    if code < 0:
        for i in np.flatnonzero((g.start >= 0) | (g.layer0 != 0) | (g.layer1 != view.layers)).tolist():
            _check_rectangle(g, i, view)
    _check_blocks(g, view, lanes)


def _check_rectangle(g: Grants, i: int, view: EngineView) -> None:
    slot = int(g.slot[i])
    computed = int(view.computed[slot])
    a = computed if g.start[i] < 0 else int(g.start[i])
    fronts = view.table.fronts.get(slot, [])
    if not legal(computed, fronts, a, a + int(g.tokens[i]), int(g.layer0[i]), int(g.layer1[i]), view.layers):
        raise PolicyError(f"slot {slot}: tokens [{a}, {a + int(g.tokens[i])}) x layers [{g.layer0[i]}, {g.layer1[i]}) breaks the staircase")


def _check_blocks(g: Grants, view: EngineView, lanes: Sequence[KVCache]) -> None:
    for lane, kv in enumerate(lanes):
        mine = g.lane == lane
        part = g if mine.all() else g.select(mine)
        if not len(part):
            continue
        if lane == 0 and not len(g.evict):
            ledger, free = view.ledger, view.free  # the policy took from this ledger; ``free`` is what it began with
        else:
            ledger = kv.ledger()
            for slot in g.evict.tolist():
                ledger.give(slot)
            free = ledger.free
        upto = np.empty(len(part), np.int32)
        reach(part.slot, part.start, part.tokens + part.draft, view.computed if lane == 0 else view.table.computed[:, lane], upto)
        need = ledger.need(part.slot, upto).sum(0)
        if (need > free).any():
            raise PolicyError(f"the plan needs {need.tolist()} blocks of lane {lane} and {free.tolist()} are free")
