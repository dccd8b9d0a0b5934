"""The hot table: one numpy row (slot) per live request. The loop is its only writer; policies read it through the view.

State table (whatever is not listed raises IllegalTransition):

    FREE -> QUEUED       a request arrives and is admitted or parked
    QUEUED -> RUNNING    granted with no wait bit set
    RUNNING -> QUEUED    evicted (nothing in flight): computed = 0, outputs and companions kept
    RUNNING -> HELD      paused, drained or handed off
    HELD -> RUNNING      resumed
    HELD -> QUEUED       its memory is needed, or its KV was lost
    QUEUED -> HELD       paused while queued (nothing to keep), or blocks reserved for an import
    any -> ENDING        stop, length, abort, error;  ENDING -> FREE once nothing is in flight
"""

from __future__ import annotations

import math

import numpy as np

from presage.core.errors import IllegalTransition
from presage.core.types import Ints, State

LANES = 4

_LEGAL = {
    State.FREE: {State.QUEUED, State.RUNNING},
    State.QUEUED: {State.RUNNING, State.HELD, State.ENDING},
    State.RUNNING: {State.QUEUED, State.HELD, State.ENDING},
    State.HELD: {State.RUNNING, State.QUEUED, State.ENDING},
    State.ENDING: {State.FREE},
}

_CHANGES = frozenset((int(a), int(b)) for a, to in _LEGAL.items() for b in to)

_COLUMNS: dict[str, tuple[type, float]] = {
    "state": (np.uint8, 0),
    "hold": (np.uint8, 0),
    "fed": (np.uint8, 0),
    "lead": (np.uint8, 0),
    "inflight": (np.uint8, 0),
    "limit_at": (np.uint8, 0),
    "kind": (np.uint8, 0),
    "flags": (np.uint8, 0),
    "waits": (np.uint16, 0),
    "epoch": (np.int32, 0),
    "prompt": (np.int32, 0),
    "known": (np.int32, 0),
    "out": (np.int32, 0),
    "limit": (np.int32, 0),
    "end": (np.int32, 0),
    "pending": (np.int32, 0),
    "flying": (np.int32, 0),
    "last": (np.int32, -1),
    "row": (np.int32, -1),
    "hit": (np.int32, 0),
    "hint": (np.int32, 0),
    "ask": (np.int32, 0),
    "pins": (np.int16, 0),
    "preempted": (np.int32, 0),
    "priority": (np.int32, 0),
    "adapter": (np.int32, -1),
    "tenant": (np.int32, 0),
    "program": (np.int32, -1),
    "score": (np.float32, 0),
    "arrival": (np.float64, 0),
    "seq": (np.int64, 0),
    "t_start": (np.float64, 0),
    "t_first": (np.float64, 0),
    "due_first": (np.float64, math.inf),
    "due_next": (np.float64, math.inf),
    "due_end": (np.float64, math.inf),
}


_FILLS = tuple((name, fill) for name, (_, fill) in _COLUMNS.items() if fill)
_ZEROS = tuple(name for name, (_, fill) in _COLUMNS.items() if not fill)


class Table:
    """Columns by slot. Lengths are tokens; times are seconds on the engine's clock.

    ``known`` = ids decided (prompt + emitted + injected). ``limit`` is the ``known`` at which to stop, hand off or call the program
    (``limit_at``); ``end`` is the ``known`` at which the request ends by length whatever ``limit`` says.
    ``computed[slot, lane]`` = tokens with committed KV in all layers, at most known - 1 for a generating lead lane.
    ``fronts[slot]`` = open rectangles above computed: [(token end, layers done)], ends increasing, layers decreasing.
    ``pending`` = upper bound of ids that steps in flight will add, ``flying`` = tokens those steps compute. ``flags``: Flag bits.
    ``last`` = last known id. ``row`` = row of the id arena, -1 if queued.
    ``epoch`` rises when the occupant changes or results in flight become void. ``seq`` is the arrival order, the tie breaker everywhere.
    """

    state: np.ndarray
    hold: np.ndarray
    fed: np.ndarray
    lead: np.ndarray
    inflight: np.ndarray
    limit_at: np.ndarray
    kind: np.ndarray
    flags: np.ndarray
    waits: np.ndarray
    epoch: np.ndarray
    prompt: np.ndarray
    known: np.ndarray
    out: np.ndarray
    limit: np.ndarray
    end: np.ndarray
    pending: np.ndarray
    flying: np.ndarray
    last: np.ndarray
    row: np.ndarray
    hit: np.ndarray
    hint: np.ndarray
    ask: np.ndarray
    pins: np.ndarray
    preempted: np.ndarray
    priority: np.ndarray
    adapter: np.ndarray
    tenant: np.ndarray
    program: np.ndarray
    score: np.ndarray
    arrival: np.ndarray
    seq: np.ndarray
    t_start: np.ndarray
    t_first: np.ndarray
    due_first: np.ndarray
    due_next: np.ndarray
    due_end: np.ndarray

    def __init__(self, capacity: int = 64) -> None:
        for name, (dtype, fill) in _COLUMNS.items():
            setattr(self, name, np.full(capacity, fill, dtype))
        self.computed = np.zeros((capacity, LANES), np.int32)
        self.fronts: dict[int, list[tuple[int, int]]] = {}
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def capacity(self) -> int:
        """Slots allocated; doubles when the last one is taken."""
        return len(self.state)

    def take(self) -> int:
        """A FREE slot with all columns reset but ``epoch``, which rises."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        epoch = int(self.epoch[slot]) + 1
        columns = vars(self)
        for name, fill in _FILLS:
            columns[name][slot] = fill
        for name in _ZEROS:
            columns[name][slot] = 0
        self.epoch[slot] = epoch
        self.computed[slot] = 0
        return slot

    def move(self, slot: int, to: State) -> None:
        """Change a slot's state. Raises IllegalTransition for a change the table does not list."""
        if (int(self.state[slot]), int(to)) not in _CHANGES:
            raise IllegalTransition(f"slot {slot}: {State(int(self.state[slot])).name} -> {to.name}")
        self.state[slot] = to
        if to == State.FREE:
            self.fronts.pop(slot, None)
            self._free.append(slot)

    def slots(self, state: State) -> Ints:
        """Slots in a state, ascending."""
        return np.flatnonzero(self.state == state).astype(np.int32)

    def _grow(self) -> None:
        old = self.capacity
        for name, (dtype, fill) in _COLUMNS.items():
            setattr(self, name, np.concatenate([getattr(self, name), np.full(old, fill, dtype)]))
        self.computed = np.concatenate([self.computed, np.zeros((old, LANES), np.int32)])
        self._free = list(range(2 * old - 1, old - 1, -1))


class Arena:
    """Token ids of running slots: ``ids[row, :known]``. Rows are virtual memory until written; queued slots hold no row."""

    def __init__(self, rows: int, width: int) -> None:
        self.ids = np.empty((rows, width), np.int32)
        self._free = list(range(rows - 1, -1, -1))

    def take(self) -> int:
        """A free row; doubles the arena when none is left."""
        if not self._free:
            rows = len(self.ids)
            bigger = np.empty((2 * rows, self.ids.shape[1]), np.int32)
            bigger[:rows] = self.ids
            self.ids, self._free = bigger, list(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def give(self, row: int) -> None:
        """Return a row."""
        self._free.append(row)
