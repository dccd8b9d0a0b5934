"""Turns settled steps into Emissions, off the critical path: ``put`` keeps references, ``flush`` builds and sends after the next launch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from presage.core.errors import PresageError
from presage.core.plan import NewIds, StepDone, StepPlan
from presage.core.request import Emission, Request
from presage.core.table import Table
from presage.core.types import Finish, Ints, Want

_EXIT = int(Want.EXIT)
Sink = Callable[[list[Emission]], None]


class Emitter:
    """One Emission per request and step for client requests; a terminal one exactly once."""

    def __init__(self, table: Table, requests: dict[int, Request], sink: Sink) -> None:
        self.table, self.requests, self.sink = table, requests, sink
        self.hits: dict[int, int] = {}
        self.out: list[Emission] = []
        self.open: dict[int, Emission] = {}

    def put(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray) -> None:
        """Collect one step's ids; called before the loop ends slots, so each slot's last ids precede its terminal mark."""
        self._seal()
        ids, off, slots = new.ids.tolist(), new.off.tolist(), new.slot.tolist()
        prompt_lp = done.exports.get("prompt_logprobs", {})
        out = (self.table.out[new.slot] - np.diff(new.off)).tolist()
        alive = live.tolist()
        for s, slot in enumerate(slots):
            if not alive[s] or (off[s] == off[s + 1] and s not in prompt_lp):
                continue
            req = self.requests[slot]
            if req.sink != "client":
                continue
            logprobs = done.logprobs.get(s)
            kept = ids[off[s] : off[s + 1]]
            self.open[slot] = Emission(req.id, req.branch, out[s], kept, logprobs[: len(kept)] if logprobs else None)
            if s in prompt_lp:
                self.open[slot].prompt_logprobs = prompt_lp[s]
        for s, vector in done.exports.get("pooled", {}).items():
            if alive[s] and plan.want[s] & _EXIT and self.requests[slots[s]].sink == "client":
                req = self.requests[slots[s]]
                self.open[slots[s]] = Emission(req.id, req.branch, 0, [], pooled=np.asarray(vector, np.float32).tolist())

    def last(self, slot: int, finish: Finish, stop: int | str | None, error: tuple[str, str, int] | None) -> None:
        """The terminal emission of a slot; joins this step's ids if there are any."""
        t, req = self.table, self.requests[slot]
        if req.sink != "client":
            self.hits.pop(slot, None)
            return
        e = self.open.get(slot)
        if e is None:
            e = self.open[slot] = Emission(req.id, req.branch, int(t.out[slot]), [])
        e.finish, e.stop, e.error = finish.name.lower(), stop, error
        e.n_prompt, e.n_cached = int(t.prompt[slot]), self.hits.pop(slot, 0)
        e.times = (float(t.arrival[slot]), float(t.t_start[slot]), float(t.t_first[slot]))
        e.preemptions = int(t.preempted[slot])

    def refuse(self, req: Request, branch: int, error: PresageError) -> None:
        """A terminal emission for a request that took no slot."""
        self.terminal(req, branch, Finish.ERROR, (error.code, error.message, error.status))

    def terminal(self, req: Request, branch: int, finish: Finish, error: tuple[str, str, int] | None) -> None:
        """A terminal emission for a branch that has no slot."""
        self.out.append(Emission(req.id, branch, 0, [], finish=finish.name.lower(), error=error, n_prompt=len(req.prompt)))

    def injected(self, slot: int, ids: Ints) -> None:
        """Ids that a program appended."""
        self._seal()
        req = self.requests[slot]
        if req.sink == "client":
            self.open[slot] = Emission(req.id, req.branch, int(self.table.out[slot]) - len(ids), ids.tolist())

    def sent(self, slot: int) -> int:
        """Output ids the client has or will have: all of them, since a step's ids are sent when it settles."""
        return int(self.table.out[slot]) if self.requests[slot].sink == "client" else 0

    def flush(self) -> None:
        """Send what was collected. Tokens of requests whose sink is a program go to nobody here."""
        self._seal()
        if self.out:
            out, self.out = self.out, []
            self.sink(out)

    def _seal(self) -> None:
        if self.open:
            self.out.extend(self.open.values())
            self.open = {}
