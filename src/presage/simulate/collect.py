"""Takes the emitter's place: one row of numbers per request instead of one object per token; and the timeline of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from presage.core.errors import PresageError
from presage.core.plan import NewIds, StepDone, StepPlan
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Finish, Ints

COLUMNS = ("arrival", "start", "first", "done", "n_in", "n_out", "n_cached", "preemptions", "finish", "replica", "seq")
STEP_COLUMNS = ("t0", "t1", "rows", "spans", "prompt_rows", "draft_rows", "kv_tokens", "joules", "repeat", "replica")


class Columns:
    """Rows of float64 appended to a doubling array."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.n, self.data = names, 0, np.empty((256, len(names)))

    def add(self, row: tuple[float, ...]) -> None:
        """Append one row."""
        if self.n == len(self.data):
            self.data = np.concatenate([self.data, np.empty_like(self.data)])
        self.data[self.n] = row
        self.n += 1

    def table(self) -> dict[str, np.ndarray]:
        """Columns by name."""
        return {name: self.data[: self.n, i].copy() for i, name in enumerate(self.names)}


class Collector:
    """What a run leaves behind, over all replicas. ``ids`` [n] and ``rows`` belong together, in order of completion."""

    def __init__(self, keep_tokens: bool = False, timeline: bool = True) -> None:
        self.keep_tokens, self.timeline = keep_tokens, timeline
        self.ids: list[str] = []
        self.errors: dict[int, str] = {}
        self.rows, self.steps = Columns(COLUMNS), Columns(STEP_COLUMNS)
        self.busy = self.joules = 0.0
        self.generated = self.n_steps = 0
        self.tokens: list[tuple[int, np.ndarray, np.ndarray, Any]] = []

    def step(self, replica: int, plan: StepPlan, t0: float, t1: float, joules: float, repeat: int) -> None:
        """``repeat`` like steps that ran from ``t0`` to ``t1``."""
        self.busy += t1 - t0
        self.joules += joules
        self.n_steps += repeat
        if self.timeline:
            f = plan.features
            self.steps.add((t0, t1, f[0], f[1], f[3], f[4], f[6], joules, repeat, replica))

    def token_times(self) -> dict[tuple[int, int], np.ndarray]:
        """Arrival time of every token by (replica, seq), if ``keep_tokens``."""
        where: dict[tuple[int, int], list[np.ndarray]] = {}
        for replica, seqs, counts, times in self.tokens:
            for seq, n in zip(seqs.tolist(), counts.tolist()):
                if n:
                    where.setdefault((replica, seq), []).append(np.repeat(times, n))
        return {key: np.concatenate(parts) for key, parts in where.items()}


class RowEmitter:
    """Has the interface of ``engine.emitter.Emitter``. Nothing is built per token: first and last times stand in the table."""

    def __init__(self, table: Table, requests: dict[int, Request], out: Collector, replica: int = 0) -> None:
        self.table, self.requests, self.out, self.replica = table, requests, out, replica
        self.hits: dict[int, int] = {}
        self.now = 0.0
        self.ended: Callable[[int, Request, str], None] = lambda row, req, finish: None

    def put(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray) -> None:
        """A step's ids."""
        self.out.generated += len(new.ids)
        if self.out.keep_tokens:
            self.out.tokens.append((self.replica, self.table.seq[new.slot], np.diff(new.off), self.now))

    def last(self, slot: int, finish: Finish, stop: int | str | None, error: tuple[str, str, int] | None) -> None:
        """A request ended: its row."""
        t, req = self.table, self.requests[slot]
        row = (
            t.arrival[slot], t.t_start[slot], t.t_first[slot], self.now, t.prompt[slot], t.out[slot], self.hits.pop(slot, 0),
            t.preempted[slot], finish, self.replica, t.seq[slot],
        )  # fmt: skip
        self._add(req, row, finish, error)

    def refuse(self, req: Request, branch: int, error: PresageError) -> None:
        """A request that took no slot."""
        self.terminal(req, branch, Finish.ERROR, (error.code, error.message, error.status))

    def terminal(self, req: Request, branch: int, finish: Finish, error: tuple[str, str, int] | None) -> None:
        """The end of a branch that has no slot."""
        self._add(req, (req.arrival, 0.0, 0.0, self.now, len(req.prompt), 0, 0, 0, finish, self.replica, -1), finish, error)

    def _add(self, req: Request, row: tuple[float, ...], finish: Finish, error: tuple[str, str, int] | None) -> None:
        out = self.out
        out.ids.append(req.id)
        if error is not None:
            out.errors[out.rows.n] = error[0]
        out.rows.add(row)
        self.ended(out.rows.n - 1, req, finish.name.lower())

    def injected(self, slot: int, ids: Ints) -> None:
        """Ids a program appended count as output."""
        self.out.generated += len(ids)

    def sent(self, slot: int) -> int:
        """As the real emitter: everything known was sent."""
        return int(self.table.out[slot]) if self.requests[slot].sink == "client" else 0

    def flush(self) -> None:
        """Nothing is held back."""
