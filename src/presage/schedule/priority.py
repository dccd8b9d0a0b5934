"""Priority classes: lower numbers first, arrival order within a class; the least important is evicted first (vLLM's ``priority``).

It acts when slots or memory are short; it does not interrupt a running request that has both.
"""

from __future__ import annotations

import numpy as np

from presage.core.protocols import EngineView
from presage.core.types import Ints
from presage.schedule.fcfs import Fcfs


class Priority(Fcfs):
    """FCFS with (priority, arrival) as the key of both the queue and the choice of victims."""

    def order(self, view: EngineView) -> Ints:
        """Queue by (priority, arrival)."""
        q = view.queue
        return q[np.lexsort((view.table.seq[q], view.table.priority[q]))]

    def victims(self, view: EngineView, slots: Ints) -> Ints:
        """Largest (priority, arrival) first."""
        return slots[np.lexsort((view.table.seq[slots], view.table.priority[slots]))[::-1]]
