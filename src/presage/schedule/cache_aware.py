"""Longest prefix first (SGLang, arXiv 2312.07104): who can reuse most of the cache goes first, before it is evicted.

Requests without a hit that share their beginning with one that goes before them wait until its prefix is there, so it is computed once:
that needs the ids of prompts, which the policy sees if the engine tells it of arrivals (``Informed``); else hits alone decide. ``patience``
keeps requests without any prefix from starving.
"""

from __future__ import annotations

import zlib

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Floats, Ints
from presage.schedule.informed import Informed


class CacheAware(Informed):
    """Rank = - tokens of the prefix hit. ``share``: tokens that must agree for two prompts to count as one family."""

    def __init__(self, config: SchedulerConfig | None = None, share: int = 32, patience: float = 10.0) -> None:
        super().__init__(config, patience)
        if share < 1:
            raise ValueError("share must be at least 1 token")
        self.share = share
        self.family: dict[int, int] = {}

    def open(self, slot: int, req: Request) -> None:
        """Remember which prompts begin alike (and may share: equal salt and adapter)."""
        head = np.ascontiguousarray(req.prompt[: self.share], np.int32)
        if len(head) == self.share:
            self.family[slot] = zlib.crc32(head.tobytes(), zlib.crc32(req.salt + (req.adapter or "").encode()))

    def close(self, slot: int) -> None:
        """Forget the slot."""
        self.family.pop(slot, None)

    def rank(self, view: EngineView, slots: Ints) -> Floats:
        """Longest hit first."""
        return -view.table.hit[slots].astype(np.float64)

    def order(self, view: EngineView) -> Ints:
        """Longest hit first; who would compute what somebody before it computes now goes last."""
        order = super().order(view)
        if not self.family:
            return order
        busy = {self.family.get(s) for s in view.ready[view.gap[view.ready] > 1].tolist()}
        overdue = self.overdue(view, order)
        late = np.zeros(len(order), bool)
        for i, slot in enumerate(order.tolist()):
            family = self.family.get(slot)
            if family is not None and view.table.hit[slot] < self.share and not overdue[i]:
                late[i] = family in busy
                busy.add(family)
        return np.concatenate([order[~late], order[late]])
