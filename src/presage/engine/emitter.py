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
        self.steps: list[tuple[StepPlan, StepDone, NewIds, np.ndarray, Ints]] = []
        self.ends: dict[int, tuple[Request, Emission]] = {}

    def put(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray) -> None:
        """Keep one step's ids; called before the loop ends slots, so each slot's last ids precede its terminal mark."""
        self.steps.append((plan, done, new, live, self.table.out[new.slot] - new.off[1:] + new.off[:-1]))

    def last(self, slot: int, finish: Finish, stop: int | str | None, error: tuple[str, str, int] | None) -> None:
        """The terminal emission of a slot; ``flush`` joins it with this turn's ids if there are any."""
        t, req = self.table, self.requests[slot]
        e = Emission(req.id, req.branch, int(t.out[slot]), [], None, finish.name.lower(), stop, error)
        e.n_prompt, e.n_cached = int(t.prompt[slot]), self.hits.pop(slot, 0)
        e.times = (float(t.arrival[slot]), float(t.t_start[slot]), float(t.t_first[slot]))
        e.preemptions = int(t.preempted[slot])
        self.ends[slot] = (req, e)

    def refuse(self, req: Request, branch: int, error: PresageError) -> None:
        """A terminal emission for a request that took no slot."""
        self.terminal(req, branch, Finish.ERROR, (error.code, error.message, error.status))

    def terminal(self, req: Request, branch: int, finish: Finish, error: tuple[str, str, int] | None) -> None:
        """A terminal emission for a branch that has no slot."""
        self.out.append(Emission(req.id, branch, 0, [], finish=finish.name.lower(), error=error, n_prompt=len(req.prompt)))

    def injected(self, slot: int, ids: Ints) -> None:
        """Ids that a program appended."""
        self._build(final=False)
        req = self.requests[slot]
        if req.sink == "client":
            self.out.append(Emission(req.id, req.branch, int(self.table.out[slot]) - len(ids), ids.tolist()))

    def sent(self, slot: int) -> int:
        """Output ids the client has or will have: all of them, since a step's ids are sent when it settles."""
        return int(self.table.out[slot]) if self.requests[slot].sink == "client" else 0

    def flush(self) -> None:
        """Send what was collected. Tokens of requests whose sink is a program go to nobody here."""
        if self.steps or self.ends:
            self._build(final=True)
        if self.out:
            out, self.out = self.out, []
            self.sink(out)

    def _build(self, final: bool) -> None:
        open_: dict[int, Emission] = {}
        for step in self.steps:
            self._collect(open_, *step)
        self.steps = []
        if final:
            for slot, (req, end) in self.ends.items():
                e = open_.get(slot)
                if req.sink != "client":
                    continue
                if e is None:
                    open_[slot] = end
                    continue
                e.finish, e.stop, e.error, e.n_prompt, e.n_cached = end.finish, end.stop, end.error, end.n_prompt, end.n_cached
                e.times, e.preemptions = end.times, end.preemptions
            self.ends = {}
        self.out.extend(open_.values())

    def _collect(self, open_: dict[int, Emission], plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray, out: Ints) -> None:
        ids, off, slots, at, alive = new.ids.tolist(), new.off.tolist(), new.slot.tolist(), out.tolist(), live.tolist()
        prompts, pooled = done.exports.get("prompt_logprobs", {}), done.exports.get("pooled", {})
        for s, slot in enumerate(slots):
            if not alive[s] or (off[s] == off[s + 1] and s not in prompts and s not in pooled):
                continue
            req = self.requests.get(slot) or self.ends[slot][0]
            if req.sink != "client":
                continue
            if slot in open_:  # two steps settled in one turn
                self.out.append(open_.pop(slot))
            kept, logprobs = ids[off[s] : off[s + 1]], done.logprobs.get(s)
            e = open_[slot] = Emission(req.id, req.branch, at[s], kept, logprobs[: len(kept)] if logprobs else None)
            e.prompt_logprobs = prompts.get(s)
            if s in pooled and plan.want[s] & _EXIT:
                e.pooled = np.asarray(pooled[s], np.float32).tolist()
