"""Policies that are a number per request: lower is served first, the highest is evicted first. The base of most orders here.

Whoever had to wait longer than ``patience`` seconds for its start, or for its next token, goes before all ranks in order of arrival, so no
order starves anybody. With ``margin`` a waiting request takes the place of a running one whose rank is worse by more than that.
"""

from __future__ import annotations

import math

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.protocols import EngineView
from presage.core.types import EMPTY, Floats, Ints
from presage.schedule.fcfs import Fcfs

AT_ONCE = 4
"""Requests that give way in one step at most."""
OFTEN = 2
"""Evictions after which a request does not give way to better ranks any more: it would never end."""


class Ranked(Fcfs):
    """FCFS whose queue, chunks and victims follow ``rank``. ``margin`` inf: nobody gives way (memory shortage aside)."""

    def __init__(self, config: SchedulerConfig | None = None, patience: float = 30.0, margin: float = math.inf) -> None:
        super().__init__(config)
        if patience <= 0 or margin < 0:
            raise ValueError("patience must be above 0 seconds and margin not below 0")
        self.patience, self.margin = patience, margin
        self.trades = math.isfinite(margin)

    def rank(self, view: EngineView, slots: Ints) -> Floats:
        """A number per slot; lower is served first, equals by arrival."""
        return view.table.seq[slots].astype(np.float64)

    def order(self, view: EngineView) -> Ints:
        """Queue by (overdue, rank, arrival)."""
        return self._sorted(view, view.queue)

    def served(self, view: EngineView, slots: Ints) -> Ints:
        """Running slots by (overdue, rank, arrival)."""
        return self._sorted(view, slots)

    def victims(self, view: EngineView, slots: Ints) -> Ints:
        """Worst rank first."""
        return self._sorted(view, slots)[::-1]

    def overdue(self, view: EngineView, slots: Ints) -> np.ndarray:
        """Who waits, or had to wait before its start, for longer than ``patience``. The latter for good: or it would come and go."""
        t = view.table
        start, last = t.t_start[slots], t.due_next[slots]
        begun = np.where(start > 0, start, view.now) - t.arrival[slots]
        idle = np.where(np.isfinite(last), view.now - last, 0.0)
        return np.asarray(np.maximum(begun, idle) > self.patience)

    def yields(self, view: EngineView) -> Ints:
        """The worst running slots, one for each waiting one that is better by ``margin`` and has no seat or no memory."""
        if not self.trades or not len(view.queue) or len(view.ready) < 2:
            return EMPTY
        waiting, running = self._keys(view, view.queue), self._keys(view, view.ready)
        if not running.max() > waiting.min() + self.margin:
            return EMPTY
        t, free = view.table, view.ledger.free
        best, worst = self.order(view)[:AT_ONCE], self.victims(view, view.ready)
        worst = worst[t.preempted[worst] < OFTEN][:AT_ONCE]
        n = min(len(best), len(worst), len(view.ready) - 1)
        if not n or (view.running < view.max_num_seqs and bool((self._blocks(view, int(best[0])) <= free).all())):
            return EMPTY
        better = self._keys(view, worst[:n]) > self._keys(view, best[:n]) + self.margin
        n = n if better.all() else int(np.argmin(better))
        # What they hold must be enough for whom they leave for.
        held = sum((self._blocks(view, int(s)) for s in worst[:n]), free)
        return worst[:n] if n and bool((self._blocks(view, int(best[0])) <= held).all()) else EMPTY

    def _blocks(self, view: EngineView, slot: int) -> np.ndarray:
        return view.ledger.whole(slot, int(view.known[slot]))

    def _keys(self, view: EngineView, slots: Ints) -> Floats:
        return np.where(self.overdue(view, slots), -np.inf, self.rank(view, slots))

    def _sorted(self, view: EngineView, slots: Ints) -> Ints:
        if len(slots) < 2:
            return slots
        return slots[np.lexsort((view.table.seq[slots], self._keys(view, slots)))]
