"""Who may draft in a step, and how much: what every length policy reads from the view and the grants."""

from __future__ import annotations

import numpy as np

from presage.core.plan import Draft, Grants
from presage.core.protocols import EngineView
from presage.core.types import Ints, Kind

_PREFILL = int(Kind.PREFILL)


def decoding(view: EngineView, hint: Ints) -> Ints:
    """Ready slots that lack one token only (they sample in this step) and for which the drafter has something, in admission order."""
    slots = view.ready
    return slots[(view.gap[slots] == 1) & (hint[slots] > 0) & (view.table.kind[slots] <= _PREFILL)]


def within(grants: Grants, draft: Draft) -> np.ndarray:
    """[N] True for the first ``grants.draft`` nodes of each grant. Parents come first, so the mask is prefix-closed."""
    count = np.diff(draft.offset)
    place = np.arange(len(draft)) - np.repeat(draft.offset[:-1], count)
    return np.asarray(place < np.repeat(grants.draft, count))


def affordable(view: EngineView, ask: Ints) -> Ints:
    """``ask`` [C] without the drafts that would take blocks other requests need: nobody is evicted for a guess."""
    slots = view.ready[ask[view.ready] > 0]
    # A block holds at least one token, so this many are enough; counting exactly is only worth its price when memory is short.
    if not len(slots) or int(ask[slots].sum()) + 2 * len(view.ready) <= int(view.free.min()):
        return ask
    base = view.known[view.ready]
    plain = view.ledger.need(view.ready, base).sum(0)
    more = view.ledger.need(slots, view.known[slots] + ask[slots]) - view.ledger.need(slots, view.known[slots])
    over = (plain + more.cumsum(0) > view.free).any(1)
    if over.any():
        ask[slots[over]] = 0
    return ask
