"""Virtual token counter (VTC; "Fairness in Serving Large Language Models", arXiv 2401.00588): equal service to tenants who have work.

A counter per tenant grows with the prompt tokens computed for it and, ``output_weight`` times as fast, with the tokens generated for it; the
tenant with the smallest counter is served first. A tenant that comes back from idleness is lifted to the least of the others, so idleness
earns no credit. Work-conserving: a lone tenant gets everything.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from presage.core.config import SchedulerConfig
from presage.core.plan import Budget, Facts, Grants
from presage.core.protocols import EngineView
from presage.core.types import Ints
from presage.schedule.fcfs import Fcfs


class Fair(Fcfs):
    """``weights``: tenant number (order of first arrival, from 0) -> share; 1 each by default. Prompt tokens that hit the cache are free.

    Tokens computed again after an eviction are not charged again: the tenant did not ask for them.
    """

    def __init__(
        self, config: SchedulerConfig | None = None, prompt_weight: float = 1.0, output_weight: float = 2.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.prompt_weight, self.output_weight = prompt_weight, output_weight
        self.weights = {int(k): float(v) for k, v in (weights or {}).items()}
        if min([prompt_weight, output_weight, *self.weights.values()], default=1.0) < 0 or 0.0 in self.weights.values():
            raise ValueError("weights must be above 0")
        self.counter, self.share = np.zeros(0), np.ones(0)
        self._tenant, self._prompt, self._paid, self._epoch = (np.zeros(0, np.int32) for _ in range(4))
        self._waiting: set[int] = set()
        self._last = 0

    def order(self, view: EngineView) -> Ints:
        """The k-th waiting request of a tenant starts at its counter plus what the k - 1 before it will charge; smallest first."""
        self._see(view)
        q, t = view.queue, view.table
        if not len(q):
            return q
        tenant = t.tenant[q]
        cost = self.prompt_weight * view.gap[q] / self.share[tenant]
        by = np.lexsort((t.seq[q], tenant))
        run = np.cumsum(cost[by])
        first = np.r_[True, np.diff(tenant[by]) != 0]
        # What the tenant's earlier requests charge: the running sum less the sum where the tenant begins.
        before = run - cost[by] - np.repeat((run - cost[by])[first], np.diff(np.r_[np.flatnonzero(first), len(q)]))
        return q[by[np.lexsort((t.seq[q][by], self.counter[tenant[by]] + before))]]

    def victims(self, view: EngineView, slots: Ints) -> Ints:
        """The last admitted of the tenant that had most."""
        self._see(view)
        place = np.arange(len(slots))
        return slots[np.lexsort((-place, -self.counter[view.table.tenant[slots]]))]

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """As FCFS, with tenants noted for the charges."""
        self._see(view)
        return super().plan(view, budget)

    def observe(self, facts: Facts) -> None:
        """Charge what the step computed and said."""
        plan, new = facts.plan, facts.new
        s = plan.slot
        if not len(s) or int(s.max()) >= len(self._tenant):
            return
        self._paid[s[self._epoch[s] != facts.grants.epoch]] = 0
        self._epoch[s] = facts.grants.epoch
        # A chunk's tokens beyond the prompt were generated once, and charged then.
        end = np.minimum(plan.start + plan.count, self._prompt[s])
        asked = np.maximum(end - np.maximum(self._paid[s], plan.start), 0)
        self._paid[s] = np.maximum(self._paid[s], end)
        charge = (self.prompt_weight * asked + self.output_weight * np.diff(new.off)) / self.share[self._tenant[s]]
        np.add.at(self.counter, self._tenant[s], charge)
        self._last = int(self._tenant[s[-1]])

    def steady(self, view: EngineView) -> int:
        """Every step is charged."""
        return 1

    def _see(self, view: EngineView) -> None:
        """Note who sits where, and lift tenants that come back."""
        t = view.table
        self._grow(t.capacity, int(t.tenant.max()) + 1)
        self._tenant[: t.capacity], self._prompt[: t.capacity] = t.tenant, t.prompt
        waiting = set(t.tenant[view.queue].tolist())
        back = sorted(waiting - self._waiting)
        if back:
            others = sorted(waiting & self._waiting)
            floor = min((self.counter[c] for c in others), default=float(self.counter[self._last]))
            self.counter[back] = np.maximum(self.counter[back], floor)
        self._waiting = waiting

    def _grow(self, slots: int, tenants: int) -> None:
        more = np.zeros(max(0, slots - len(self._tenant)), np.int32)
        if len(more):
            self._tenant, self._prompt, self._paid, self._epoch = (np.r_[c, more] for c in (self._tenant, self._prompt, self._paid, self._epoch))
        for tenant in range(len(self.counter), tenants):
            self.counter, self.share = np.r_[self.counter, 0.0], np.r_[self.share, self.weights.get(tenant, 1.0)]
