"""Bursts: steps in which every running request adds one token and nothing else happens are settled together.

The proof that a step is steady is the plan itself: what runs decodes only, the plan made ahead repeats it, the policy says that it would
repeat it again, and until the burst ends no request ends, waits for blocks or is watched. The running step is then moved ``k`` steps on:
table, cache and clock stand as if its ``k`` predecessors had been settled one by one, and results are equal to the bit. A burst is lazy:
it is settled when its last step ends, or as far as it got when something happens to its replica (``cut``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from presage.core.types import Flag, Ints
from presage.engine.loop import Flight, Loop
from presage.schedule.fcfs import Fcfs
from presage.schedule.priority import Priority
from presage.simulate.oracle import told

if TYPE_CHECKING:
    from presage.simulate.driver import Replica

MOST = 64
"""Steps in one burst at most: what is priced in one call, and mostly thrown away when an arrival cuts it."""
_WATCHED = int(Flag.STOP_IDS | Flag.STOP_STRINGS | Flag.GRAMMAR | Flag.PROGRAM | Flag.PROMPT_LOGPROBS)
_IGNORE_EOS = int(Flag.IGNORE_EOS)
COUNTING = (Fcfs, Priority)
"""Policies whose plan depends on gaps, seats and blocks alone, so that it repeats while these do."""


@dataclass(slots=True)
class Burst:
    """Steps that will end at ``ends`` [k + 1] (the running one first) unless something happens; ``price`` [k + 1, 2] of each."""

    flight: Flight
    features: np.ndarray
    price: np.ndarray
    ends: np.ndarray


def steady_steps(loop: Loop) -> int:
    """Steps the policy would repeat its plan for if nothing happened."""
    if type(loop.scheduler) in COUNTING:
        # A queue that has no seat is not looked at; one that has a seat may be let in by the next published block.
        return MOST + 1 if not loop.queue or len(loop.running) >= loop.config.max_num_seqs else 1
    return loop.scheduler.steady(loop.view)


@njit(cache=True)
def _plain(slot, count, nodes, want, layer0, layer1, layers, ahead_slot, ahead_tokens, ahead_draft, planned, flags, out, known, limit, eos):  # type: ignore[no-untyped-def]
    """Steps by which the running one can move on before a span ends in the step after it; 0 if it is not a plain decode."""
    left = 1 << 30
    # A plan already made for the step after this one must still be what the policy would say.
    spare = 2 if planned else 1
    for s in range(len(slot)):
        c = slot[s]
        if count[s] != 1 or nodes[s] != 0 or want[s] != 1 or layer0[s] != 0 or layer1[s] != layers or out[c] == 0:
            return 0
        if planned and (ahead_slot[s] != c or ahead_tokens[s] != 1 or ahead_draft[s] != 0):
            return 0
        if flags[c] & _WATCHED or (eos and not flags[c] & _IGNORE_EOS):
            return 0
        left = min(left, limit[c] - known[c] - spare)
    return max(0, left)


@njit(cache=True)
def _spread(f, k):  # type: ignore[no-untyped-def]
    """Features of a decode step and of the ``k`` steps after it: each reads one token more of every span."""
    out = np.empty((k + 1, 12))
    for j in range(k + 1):
        out[j] = f
        out[j, 6] += j * f[1]
        out[j, 7] += j * f[1]
        if j:
            out[j, 10] = 0.0
    return out


@njit(cache=True)
def _ends(first, price):  # type: ignore[no-untyped-def]
    """When steps end: seconds are added one by one, as the loop would."""
    out = np.empty(len(price))
    out[0] = first
    for j in range(1, len(price)):
        out[j] = out[j - 1] + price[j, 0]
    return out


@njit(cache=True)
def _advance(slot, start, k, base, row, arena, known, out, last, computed, due_next, now):  # type: ignore[no-untyped-def]
    """Append ``k`` ids of the oracle's rule to every slot; moves the spans' starts on."""
    for s in range(len(slot)):
        c = slot[s]
        for j in range(k):
            last[c] = told(base[c], start[s] + 1 + j)
            arena[row[c], known[c] + j] = last[c]
        known[c] += k
        out[c] += k
        computed[c, 0] += k
        due_next[c] = now
        start[s] += k


def _candidate(loop: Loop) -> Flight | None:
    """The running step, if it is the only one, is followed by nothing that must be asked, and is repeated by the plan ahead."""
    if len(loop.flight) != 1 or loop.making is not None or loop.dirty or loop.row_moves or loop.masker is not None:
        return None
    if loop.drafter is not None or loop.log.level != "none" or loop.programs.parked or loop.programs.events:
        return None
    # A policy says itself whether it may miss steps (``steady``); other companions than it and the oracle may not.
    if any(c is not loop.scheduler and c is not loop.executor.oracle for c in loop.companions):  # type: ignore[attr-defined]
        return None
    (flight,) = loop.flight.values()
    if flight.plan.features[3] or flight.plan.features[4]:
        return None
    n, ahead = len(flight.plan.slot), loop.ahead
    if flight.side or n != len(loop.running) or (loop.config.ahead and ahead is None):
        return None
    return flight if ahead is None or (len(ahead) == n and not len(ahead.evict)) else None


def coalesce(replica: Replica, next_arrival: float) -> Burst | None:
    """The steady steps that begin with the running one; None if there are none. ``next_arrival`` only says how many are worth pricing."""
    loop, executor = replica.loop, replica.executor
    if next_arrival <= executor.free_at or len(executor.flight) != 1 or (flight := _candidate(loop)) is None:
        return None
    plan, t, ahead = flight.plan, loop.table, loop.ahead
    planned = ahead is not None
    a = ahead if ahead is not None else flight.grants
    most = _plain(
        plan.slot, plan.count, plan.nodes, plan.want, plan.layer0, plan.layer1, executor.layers, a.slot, a.tokens, a.draft, planned,
        t.flags, t.out, t.known, t.limit, len(loop.cutter.eos) > 0,
    )  # fmt: skip
    if most < 1 or executor.oracle.replies or loop.kv.todo[plan.slot].any():  # type: ignore[attr-defined]
        return None
    most = min(most, steady_steps(loop) - 1, MOST)
    if any(g.window for g in loop.kv.geometry.groups):
        # What leaves a window is freed only when the burst is settled.
        most = min(most, loop.kv.geometry.groups[0].block_tokens)
    return _priced(replica, flight, most, next_arrival) if most >= 1 else None


def _priced(replica: Replica, flight: Flight, most: int, next_arrival: float) -> Burst | None:
    plan, executor = flight.plan, replica.executor
    _, t0, t1, joules = executor.flight[0]
    k = int(min(most, (next_arrival - t1) / max(1e-9, t1 - t0) + 2))
    if not _fits(replica.loop, plan.slot, plan.start, k):
        return None
    features = _spread(plan.features, k)
    price = executor.latency.predict(features)
    price[0] = t1 - t0, joules
    ends = _ends(t1, price)
    return Burst(flight, features, price, ends)


def _fits(loop: Loop, slots: Ints, start: Ints, k: int) -> bool:
    """Whether the burst, the running step and the one after it find their blocks."""
    # No slot crosses more block boundaries than this.
    most = len(slots) * ((k + 3) // loop.kv.geometry.groups[0].block_tokens + 1)
    if most <= min(pool.free for pool in loop.kv.pools):  # type: ignore[attr-defined]
        return True
    ledger = loop.kv.ledger()
    return not bool((ledger.need(slots, start + np.int32(k + 3)).sum(0) > ledger.free).any())


def settle(replica: Replica, burst: Burst, now: float) -> None:
    """Settle the steps of a burst that ended before ``now``: what they leave in table, cache, counters; the next one is running then."""
    k = min(len(burst.ends) - 1, int(burst.ends.searchsorted(now)))
    if k < 1:
        return
    loop, executor, plan, price, ends = replica.loop, replica.executor, burst.flight.plan, burst.price, burst.ends
    t0 = executor.flight[0][1]
    _advance_all(replica, burst.flight, k, ends)
    executor.on_step(plan, t0, float(ends[k - 1]), float(price[:k, 1].sum()), k)
    executor.flight[0] = [plan, float(ends[k - 1]), float(ends[k]), float(price[k, 1])]
    executor.free_at = float(ends[k])
    plan.features, plan.predicted = burst.features[k], float(price[k, 0]) if loop.latency is not None else 0.0
    loop.stats["step_seconds"] += float(ends[k - 1]) - t0


def _advance_all(replica: Replica, flight: Flight, k: int, ends: np.ndarray) -> None:
    loop, plan, t = replica.loop, flight.plan, replica.loop.table
    slots, n = plan.slot, len(plan.slot)
    loop.kv.apply(slots, plan.start + np.int32(k + 1))
    plan.start = plan.start.copy()
    _advance(
        slots, plan.start, k, replica.executor.oracle.base, t.row, loop.arena.ids, t.known, t.out, t.last, t.computed, t.due_next, ends[k - 1]
    )  # fmt: skip
    loop.kv.commit(slots, plan.start, loop.ids_of)
    del loop.flight[plan.id]
    plan.id += k
    loop.flight[plan.id] = flight
    loop.steps += k
    loop.stats["generated"] += n * k
    loop.stats["computed"] += n * k
    out = replica.emitter.out
    out.generated += n * k
    if out.keep_tokens:
        out.tokens += [(replica.emitter.replica, t.seq[slots], np.ones(n, np.int32), float(end)) for end in ends[:k]]
