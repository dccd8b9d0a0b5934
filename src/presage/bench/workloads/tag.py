"""Who asks and how urgently: tenants by weight, priorities, deadlines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from presage.bench.workloads.table import Workload
from presage.core.errors import ConfigError


def with_tenants(w: Workload, tenants: int | Sequence[str], skew: float = 0.0, seed: int = 0) -> Workload:
    """Tenants drawn per chain (a session has one), with weights 1 / rank ** ``skew``: 0 is even, 1 is Zipf's law."""
    names = tuple(f"tenant{i}" for i in range(tenants)) if isinstance(tenants, int) else tuple(tenants)
    if not names or skew < 0:
        raise ConfigError("tenants need a name each and a skew that is not negative", param="tenants")
    weight = 1 / np.arange(1, len(names) + 1) ** skew
    drawn = np.random.default_rng(seed).choice(len(names), len(w), p=weight / weight.sum())
    return w.with_columns(tenant=drawn[w.root_of()], tenants=names)


def with_priorities(w: Workload, shares: Sequence[float], seed: int = 0) -> Workload:
    """Priority p (lower first) for a share ``shares[p]`` of the chains; shares sum to 1."""
    if not np.isclose(sum(shares), 1) or min(shares) < 0:
        raise ConfigError(f"shares of priorities sum to 1, got {list(shares)}", param="priorities")
    return w.with_columns(priority=np.random.default_rng(seed).choice(len(shares), len(w), p=shares)[w.root_of()])


def with_deadlines(w: Workload, first: float = np.inf, each: float = np.inf, end: float = np.inf) -> Workload:
    """The same allowances (s) for every request: first token, each later one, the last one."""
    if min(first, each, end) <= 0:
        raise ConfigError("deadlines are positive numbers of seconds", param="deadlines")
    n = len(w)
    return w.with_columns(due_first=np.full(n, first), due_each=np.full(n, each), due_end=np.full(n, end))
