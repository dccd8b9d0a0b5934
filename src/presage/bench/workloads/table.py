"""A workload as columns: what is asked, when, by whom, and what must have ended before. One form for server and simulator."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from presage.bench.workloads.ragged import Ragged
from presage.core.errors import ConfigError

Message = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """``n`` requests. Columns [n] left out are filled with what means "nothing special".

    When: ``arrival`` s from the start, float64; or ``after`` another row (int32, always an earlier one, -1 = none), ``think`` s after it
    ended; ``arrival`` of such a row is the recorded time or nan. Size: ``n_in``, ``n_out`` tokens, int32, 0 = known only once its text is
    tokenised. Who: ``tenant`` indexes ``tenants``; ``session`` -1 = none, ``turn`` within it; ``priority`` lower first. Allowances in s
    from arrival: ``due_first`` first token, ``due_each`` per later token, ``due_end`` last one; inf = none.
    What, as far as known: ``hashes`` of ``block``-token blocks of the prompt (equal hashes = equal content), ``ids`` of the prompt,
    ``replies`` ids of the answer; ``prompts`` text or chat messages, ``answers`` recorded texts. ``grows``: prompts hold only what is new in
    their turn, the turns before it and the answers to them stand in front.
    """

    name: str
    arrival: np.ndarray
    n_in: np.ndarray = field(default_factory=lambda: np.empty(0))
    n_out: np.ndarray = field(default_factory=lambda: np.empty(0))
    after: np.ndarray = field(default_factory=lambda: np.empty(0))
    think: np.ndarray = field(default_factory=lambda: np.empty(0))
    session: np.ndarray = field(default_factory=lambda: np.empty(0))
    turn: np.ndarray = field(default_factory=lambda: np.empty(0))
    tenant: np.ndarray = field(default_factory=lambda: np.empty(0))
    priority: np.ndarray = field(default_factory=lambda: np.empty(0))
    due_first: np.ndarray = field(default_factory=lambda: np.empty(0))
    due_each: np.ndarray = field(default_factory=lambda: np.empty(0))
    due_end: np.ndarray = field(default_factory=lambda: np.empty(0))
    tenants: tuple[str, ...] = ("",)
    block: int = 0
    hashes: Ragged | None = None
    ids: Ragged | None = None
    replies: Ragged | None = None
    prompts: tuple[str | list[Message], ...] | None = None
    answers: tuple[str, ...] | None = None
    grows: bool = False

    def __post_init__(self) -> None:
        n = len(self.arrival)
        for name, (dtype, value) in COLUMNS.items():
            given = np.asarray(getattr(self, name))
            made: np.ndarray = np.full(n, value, dtype) if not len(given) else np.ascontiguousarray(given, dtype)
            if len(made) != n:
                raise ConfigError(f"workload {self.name}: column {name} has {len(made)} rows, arrival {n}", param="workload")
            object.__setattr__(self, name, made)
        for name in (*RAGGED, *TUPLES):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ConfigError(f"workload {self.name}: {name} has {len(column)} rows, arrival {n}", param="workload")
        if n and not ((self.after < np.arange(n)) & (self.after >= -1)).all():
            raise ConfigError(f"workload {self.name}: a row comes after itself or a later one", param="workload")
        if np.isnan(self.arrival[self.after < 0]).any():
            raise ConfigError(f"workload {self.name}: a row has neither an arrival time nor a row it comes after", param="workload")

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def roots(self) -> np.ndarray:
        """Rows that wait for no other, in order of arrival."""
        rows = np.flatnonzero(self.after < 0)
        return rows[np.argsort(self.arrival[rows], kind="stable")]

    @property
    def duration(self) -> float:
        """Seconds from 0 to the last known arrival."""
        return float(np.nanmax(self.arrival, initial=0.0))

    @property
    def rate(self) -> float:
        """Requests per second of those that have an arrival; inf if all come at once."""
        return float(len(self.roots) / self.duration) if self.duration > 0 else float("inf")

    def root_of(self) -> np.ndarray:
        """The first row of each row's chain [n]."""
        root = np.arange(len(self), dtype=np.int32)
        for i in np.flatnonzero(self.after >= 0).tolist():
            root[i] = root[self.after[i]]
        return root

    def take(self, rows: np.ndarray) -> Workload:
        """The chosen rows in that order; a row whose predecessor is not among those before it starts a chain of its own, at its arrival.

        Raises ConfigError if it has none.
        """
        where = np.full(len(self), -1, np.int32)
        where[rows] = np.arange(len(rows), dtype=np.int32)
        before = self.after[rows]
        after = np.where(before < 0, -1, where[before])
        made: dict[str, Any] = {name: getattr(self, name)[rows] for name in COLUMNS}
        made |= {name: column.take(rows) for name in RAGGED if (column := getattr(self, name)) is not None}
        made |= {name: tuple(column[i] for i in rows.tolist()) for name in TUPLES if (column := getattr(self, name)) is not None}
        return replace(self, **{**made, "after": after})

    def first(self, n: int) -> Workload:
        """``n`` rows: whole chains in order of their first arrival, the last one cut short if need be."""
        root = self.root_of()
        place = np.empty(len(self), np.int64)
        place[self.roots] = np.arange(len(self.roots))
        return self.take(np.lexsort((np.arange(len(self)), place[root]))[:n])

    def with_columns(self, **columns: Any) -> Workload:
        """The same with other columns or facts."""
        known = {f.name for f in fields(self)}
        if not columns.keys() <= known:
            raise ConfigError(f"a workload has no {sorted(columns.keys() - known)}", param="workload")
        return replace(self, **columns)


COLUMNS: dict[str, tuple[type, float]] = {
    "arrival": (np.float64, 0.0),
    "n_in": (np.int32, 0),
    "n_out": (np.int32, 0),
    "after": (np.int32, -1),
    "think": (np.float64, 0.0),
    "session": (np.int32, -1),
    "turn": (np.int32, 0),
    "tenant": (np.int32, 0),
    "priority": (np.int32, 0),
    "due_first": (np.float64, np.inf),
    "due_each": (np.float64, np.inf),
    "due_end": (np.float64, np.inf),
}
RAGGED = ("hashes", "ids", "replies")
TUPLES = ("prompts", "answers")


def chained(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns (after, session, turn) of sessions one after another, each of ``sizes[s]`` turns that wait for the turn before."""
    total = int(np.sum(sizes))
    session = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    turn = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.where(turn > 0, np.arange(total) - 1, -1), session, turn
