"""What policies see: the table as it will stand when the step they plan is launched."""

from __future__ import annotations

import numpy as np

from presage.core.protocols import EngineView, LatencyModel, Ledger
from presage.core.table import Table
from presage.core.types import Ints
from presage.engine.kernels import project


class View(EngineView):
    """Projected columns. While a step is in flight, sampling spans are taken to end one token short of their bound."""

    def __init__(self, table: Table, layers: int, max_num_seqs: int, pools: tuple[int, ...], latency: LatencyModel | None = None) -> None:
        self.table, self.layers, self.max_num_seqs, self.pools, self.latency = table, layers, max_num_seqs, pools, latency
        self.now, self.step, self.running = 0.0, 0, 0
        self.known = self.computed = self.gap = np.empty(0, np.int32)

    def project(self, running: Ints, queue: Ints, ledger: Ledger, ahead: bool) -> View:
        """Set ``ready``, ``queue``, ``gap``, ``known`` and ``computed`` for a launch now, or (``ahead``) after the flight settled."""
        t = self.table
        self.ledger, self.free, self.queue, self.running = ledger, ledger.free.copy(), queue, len(running)
        if len(self.gap) != t.capacity:
            self.known, self.computed, self.gap = (np.empty(t.capacity, np.int32) for _ in range(3))
        busy = project(
            t.state, t.lead, t.kind, t.inflight, t.known, t.limit, t.pending, t.flying, t.hit, t.computed, ahead, running,
            self.known, self.computed, self.gap,
        )  # fmt: skip
        if not busy or (ahead and not t.fronts):
            self.ready = running
        else:
            # Now: only who is not in flight. Ahead: a slot whose open rectangle is in flight is planned again when that settled.
            free = t.inflight[running] == 0
            self.ready = running[free | ~np.isin(running, list(t.fronts))] if ahead else running[free]
        return self
