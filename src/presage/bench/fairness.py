"""Who got what: measures by tenant, and how evenly they are spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from presage.bench.measures import Record, mean, percentile


def jain(values: Sequence[float] | np.ndarray) -> float:
    """Jain's index (sum x)^2 / (n sum x^2): 1 if all get the same, 1 / n if one gets everything. 1 of nothing."""
    x = np.asarray(values, float)
    return float(x.sum() ** 2 / (len(x) * (x * x).sum())) if len(x) and x.any() else 1.0


def by_tenant(records: Sequence[Record], goals: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """Requests, tokens served and latencies (s) of each tenant; ``attainment`` if there are goals."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        groups.setdefault(r.tenant, []).append(r)
    found: dict[str, dict[str, Any]] = {}
    for tenant, mine in sorted(groups.items()):
        tpot = [t for r in mine if (t := r.tpot) is not None]
        found[tenant] = {
            "requests": len(mine),
            "failed": sum(not r.ok for r in mine),
            "tokens": sum(r.n_in + r.n_out for r in mine if r.ok),
            "mean_ttft": mean([r.ttft for r in mine]),
            "p99_ttft": percentile([r.ttft for r in mine], 99),
            "mean_tpot": mean(tpot),
        }
        if goals:
            found[tenant]["attainment"] = sum(r.meets(goals) for r in mine) / len(mine)
    return found


def fairness(records: Sequence[Record]) -> dict[str, float]:
    """Jain's index over tenants: of the share of its requests that each got answered ("jain_served"), of 1 / mean TTFT ("jain_speed"), and of
    tokens ("jain_tokens"), which calls a tenant that asks for little mistreated: it means something only where all ask for more than they get.
    """
    tenants = by_tenant(records)
    served = [1 - t["failed"] / t["requests"] for t in tenants.values()]
    speed = [1 / t["mean_ttft"] for t in tenants.values() if t["mean_ttft"] > 0]
    tokens = [t["tokens"] for t in tenants.values()]
    return {"tenants": float(len(tenants)), "jain_served": jain(served), "jain_speed": jain(speed), "jain_tokens": jain(tokens)}
