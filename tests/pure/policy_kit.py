"""The conformance kit: what every scheduling policy must keep, checked at each plan it makes inside the real loop.

    from tests.pure.policy_kit import run_policy

``Watched`` stands between loop and policy. The loop itself checks budget, blocks and gaps of every plan and counts what is illegal.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage.core.plan import Budget, Facts, Grants
from presage.core.protocols import Scheduler
from presage.core.types import State
from presage.engine.null import NullExecutor, null_geometry
from tests.pure.loops import Bench


def rule(slot: int, position: int) -> int:
    """Ids that depend on the position alone: a request that was evicted, chunked or batched must say the same as a lone one."""
    return 10 + (position * 7) % 50


class Watched:
    """A policy under observation; what it broke is in ``broken``, what it decided in ``plans``."""

    def __init__(self, policy: Scheduler) -> None:
        self.policy = policy
        self.plans: list[bytes] = []
        self.broken: list[str] = []

    def plan(self, view: Any, budget: Budget) -> Grants:
        """The policy's plan, looked over."""
        t = view.table
        before = {name: getattr(t, name).tobytes() for name in ("state", "known", "out", "priority", "seq", "prompt", "waits")}
        g = self.policy.plan(view, budget)
        if any(getattr(t, name).tobytes() != was for name, was in before.items()):
            self._fault("it wrote to the table")
        self._check_grants(g, view, budget)
        self._check_eviction(g, view)
        self._check_order(g, view)
        self.plans.append(b"|".join(np.ascontiguousarray(c).tobytes() for c in (g.slot, g.tokens, g.start, g.layer0, g.layer1, g.evict)))
        return g

    def observe(self, facts: Facts) -> None:
        """Passed on."""
        self.policy.observe(facts)

    def steady(self, view: Any) -> int:
        """Passed on."""
        return self.policy.steady(view)

    def _fault(self, what: str) -> None:
        self.broken.append(f"plan {len(self.plans)}: {what}")

    def _check_grants(self, g: Grants, view: Any, budget: Budget) -> None:
        share = g.tokens * (g.layer1 - g.layer0) / view.layers
        if share.sum() > budget.tokens + 1e-9:
            self._fault(f"{share.sum()} tokens (by their share of the layers) with a budget of {budget.tokens}")
        if g.draft.sum() > budget.drafts or (g.draft > view.table.ask[g.slot]).any():
            self._fault("more drafts than the budget or the request allows")
        if view.running - len(g.evict) + int(np.isin(g.slot, view.queue).sum()) > view.max_num_seqs:
            self._fault("more running requests than seats")
        if len(np.unique(g.slot)) != len(g.slot):
            self._fault("a slot granted twice")

    def _check_eviction(self, g: Grants, view: Any) -> None:
        if len(np.unique(g.evict)) != len(g.evict) or not np.isin(g.evict, view.ready).all():
            self._fault("evicted who does not run, or twice")
        if np.isin(g.evict, g.slot).any():
            self._fault("granted and evicted at once")
        if len(g.evict) and not len(g) and view.running == len(g.evict):
            self._fault("evicted everybody and granted nothing")

    def _check_order(self, g: Grants, view: Any) -> None:
        """No inversion: who is let in stands before who is not, in the policy's own order."""
        order = getattr(self.policy, "order", None)
        if order is None or not len(g):
            return
        admitted = g.slot[np.isin(g.slot, view.queue)]
        want = order(view)[: len(admitted)]
        if set(want.tolist()) != set(admitted.tolist()):
            self._fault(f"let in {admitted.tolist()} where its order begins with {want.tolist()}")


@dataclass
class Outcome:
    """What a run left."""

    watched: Watched
    bench: Bench
    want: dict[str, tuple[int, int]] = field(default_factory=dict)

    def starts(self) -> list[str]:
        """Requests by first token."""
        seen: dict[str, None] = {}
        for e in self.bench.emissions:
            if e.ids:
                seen.setdefault(e.id)
        return list(seen)


def bench_of(policy: Scheduler, blocks: int = 24, windows: tuple[int, ...] = (0,), manual: bool = True, **settings: Any) -> tuple[Watched, Bench]:
    """A loop around a watched policy, over the null executor; policies that hear of arrivals do."""
    watched = Watched(policy)
    executor = NullExecutor(null_geometry(blocks, windows=windows), rule=rule, manual=manual)
    b = Bench(blocks, executor=executor, windows=windows, max_len=300, scheduler=watched, **settings)
    if hasattr(policy, "open"):
        b.loop.companions += (policy,)
    return watched, b


def run_policy(policy: Scheduler, seed: int, *, reload: bool = False, kw: dict[str, Any] | None = None) -> Outcome:
    """Random arrivals, results and bursts of them; every request must end. ``reload``: the policy is pickled and loaded in the middle."""
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {
        "blocks": int(rng.integers(14, 40)),
        "windows": ((0,), (0,), (0, 40), (40,))[rng.integers(4)],
        "max_num_batched_tokens": int(rng.integers(8, 100)),
        "max_num_seqs": int(rng.choice([1, 3, 5, 24])),
        "async_scheduling": bool(rng.integers(2)),
    }
    watched, b = bench_of(policy, **settings, **(kw or {}))
    out = Outcome(watched, b)
    for turn in range(40):
        for k in range(int(rng.choice([0, 1, 6], p=[0.6, 0.3, 0.1])) if len(out.want) < 20 else 0):
            prompt, tokens = int(rng.integers(1, 200)), int(rng.integers(1, 30))
            out.want[name := f"r{turn}-{k}"] = (prompt, tokens)
            b.add(name, prompt, max_tokens=tokens, priority=int(rng.integers(0, 3)), tenant=f"t{rng.integers(3)}")
        if b.executor.submitted and rng.random() < 0.8:
            b.executor.finish()
        b.turn()
        if reload and turn == 20:
            watched.policy = pickle.loads(pickle.dumps(watched.policy))
            b.loop.companions = tuple(watched.policy if c is policy else c for c in b.loop.companions)
    settle(b)
    return out


def settle(b: Bench, turns: int = 4000) -> None:
    """Finish what is left."""
    for _ in range(turns):
        if b.loop.idle:
            return
        if b.executor.submitted:
            b.executor.finish()
        b.turn()
    left = {int(s): State(int(b.loop.table.state[s])).name for s in b.loop.requests}
    raise AssertionError(f"still there: {left}")


def verify(out: Outcome) -> None:
    """Everything ended once with the right ids, nothing leaked, and every plan was legal."""
    assert not out.watched.broken, out.watched.broken[:5]
    assert out.bench.loop.stats["policy_errors"] == 0
    for name, (prompt, tokens) in out.want.items():
        assert out.bench.finishes(name) == [(0, "length")], name
        assert out.bench.output(name) == [rule(0, prompt + i) for i in range(tokens)], name
    out.bench.loop.receiver.audit()
