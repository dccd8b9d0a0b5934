"""When a workload's requests come: drawn arrivals, a recording at another speed, sessions, users who wait for their answers."""

from __future__ import annotations

import numpy as np

from presage.bench.arrivals import arrival_times
from presage.bench.workloads.table import Workload
from presage.core.errors import ConfigError


def with_rate(w: Workload, rate: float, burstiness: float = 1.0, seed: int = 0) -> Workload:
    """First turns arrive at ``rate`` per second with gamma gaps (``arrivals.arrival_times``), in the order they have; recorded times go."""
    arrival = np.full(len(w), np.nan)
    arrival[w.roots] = arrival_times(len(w.roots), rate, burstiness, seed)
    return w.with_columns(arrival=arrival)


def with_times(w: Workload, at: np.ndarray) -> Workload:
    """First turns arrive at these moments, ascending, one for each."""
    if len(at) != len(w.roots):
        raise ConfigError(f"{len(w.roots)} requests start on their own, {len(at)} times were given", param="workload")
    arrival = np.full(len(w), np.nan)
    arrival[w.roots] = at
    return w.with_columns(arrival=arrival)


def replayed(w: Workload, speed: float = 1.0) -> Workload:
    """The recorded times, ``speed`` times as fast. Think times stay: they are people's and tools', not the load's."""
    if not speed > 0:
        raise ConfigError(f"replay speed must be positive, got {speed}", param="replay_speed")
    return w.with_columns(arrival=w.arrival / speed)


def at_rate(w: Workload, rate: float) -> Workload:
    """The recorded times, stretched so that first turns come at ``rate`` per second on average: bursts stay."""
    if not rate > 0 or not np.isfinite(rate) or not w.duration > 0:
        raise ConfigError(f"cannot stretch {w.name} to a rate of {rate}", param="request_rate")
    return replayed(w, rate / w.rate)


def closed_loop(w: Workload, users: int, think: float = 0.0, think_seed: int | None = None) -> Workload:
    """``users`` who each send their next request ``think`` seconds after the answer before; exponentially drawn if ``think_seed`` is given.

    Sessions stay whole: a user starts the next one when the last is over. A closed loop says nothing of a rate: report the concurrency.
    """
    if users < 1 or think < 0:
        raise ConfigError(f"a closed loop needs at least one user and no negative think time, got {users} and {think}", param="users")
    root = w.root_of()
    ends = {int(r): i for i, r in enumerate(root)}
    after, arrival, waits = w.after.copy(), w.arrival.copy(), w.think.copy()
    drawn = np.full(len(w), think) if think_seed is None else np.random.default_rng(think_seed).exponential(think or 1e-12, len(w))
    order = w.roots
    for place, row in enumerate(order.tolist()):
        if place < users:
            arrival[row] = 0.0
        else:
            before = ends[int(order[place - users])]
            after[row], arrival[row], waits[row] = before, np.nan, drawn[row]
    if not (after < np.arange(len(w))).all():
        raise ConfigError(f"the sessions of {w.name} are not in order of their arrival: sort them first", param="workload")
    return w.with_columns(after=after, arrival=arrival, think=waits)


def ramp_times(n: int, start: float, end: float, how: str = "linear", seed: int | None = None) -> np.ndarray:
    """Times [n] at which the rate goes from ``start`` to ``end`` requests/s, ``linear`` or ``exponential``, over as long as ``n`` need.

    Gaps are the inverse of the rate at their place; with ``seed`` they are drawn around it (Poisson). Raises ConfigError.
    """
    if how not in ("linear", "exponential") or not (start > 0 and end > 0):
        raise ConfigError(f"a ramp is linear or exponential between positive rates, got {how!r} from {start} to {end}", param="ramp_up_strategy")
    share = np.arange(n) / max(1, n - 1)
    rate = start + (end - start) * share if how == "linear" else start * (end / start) ** share
    return np.asarray(np.cumsum(1 / rate if seed is None else np.random.default_rng(seed).exponential(1 / rate)))


def sessions_of(w: Workload, turns: int, think: float, seed: int = 0) -> Workload:
    """Conversations of ``turns`` requests each out of single ones, in order: each turn follows an exponentially drawn think time."""
    if turns < 1 or (w.after >= 0).any():
        raise ConfigError("sessions are made of single requests, one turn or more each", param="turns")
    n = len(w)
    turn = np.arange(n) % turns
    after = np.where(turn > 0, np.arange(n) - 1, -1)
    waits = np.where(turn > 0, np.random.default_rng(seed).exponential(think, n), 0.0)
    arrival = np.where(turn > 0, np.nan, w.arrival)
    return w.with_columns(after=after, think=waits, arrival=arrival, session=np.arange(n) // turns, turn=turn)
