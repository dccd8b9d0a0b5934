"""Programs above requests: boundary events in, commands out. A command for a slot in flight waits for that slot's settle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from presage.core.errors import IllegalTransition, RequestError
from presage.core.events import Boundary, ChildDone, Command, Drive, End, Fork, Inject, Pause, Resume, Rewrite, Started, Watch
from presage.core.plan import NewIds
from presage.core.protocols import Program
from presage.core.request import Request
from presage.core.types import At, Finish, Flag, Ints, State, Wait
from presage.program.parallel import Parallel
from presage.program.thinking import ThinkingBudget

if TYPE_CHECKING:
    from presage.engine.loop import Loop

Factory = Callable[[Request], Program]


class Programs:
    """Which program drives which slots. ``n > 1`` is the built-in ``Parallel``; others come from ``factories`` by ``Request.program``."""

    def __init__(self, loop: Loop, factories: dict[str, Factory] | None = None) -> None:
        self.loop, self.factories = loop, factories or {}
        self.of: dict[int, Program] = {}
        self.unforked: set[int] = set()
        self.events: list[tuple[Program, Any]] = []
        self.parked: dict[int, list[Command]] = {}

    def started(self, slot: int, req: Request) -> None:
        """A request took a slot; give it a program if it names one or has n > 1."""
        program: Program | None = None
        if req.program in self.factories:
            program = self.factories[req.program](req)
        elif req.sampling.n > 1 and req.branch == 0 and not req.extras.get("forked"):
            program = Parallel(req.sampling.n)
            self.unforked.add(slot)
        elif req.sampling.thinking_budget is not None and "thinking_end_id" in req.extras:
            program = ThinkingBudget(req.sampling.thinking_budget, int(req.extras["thinking_end_id"]))
        if program is not None:
            self._bind(slot, program)
            self.events.append((program, Started(slot, req)))

    def reached(self, slot: int) -> None:
        """A slot of a program reached its watched length."""
        loop, t = self.loop, self.loop.table
        if slot not in self.of or t.limit_at[slot] != At.BOUNDARY:
            return
        t.limit[slot], t.limit_at[slot] = t.end[slot], At.LENGTH
        finish = "" if t.state[slot] == State.RUNNING else "stop"
        self.events.append((self.of[slot], Boundary(slot, loop.requests[slot], int(t.out[slot]), self._outputs(slot), finish)))

    def ended(self, slot: int, finish: Finish, error: tuple[str, str, int] | None) -> None:
        """A slot ended; its program is told. Branches that were never forked end with it."""
        req = self.loop.requests[slot]
        if slot in self.unforked and (error or finish is Finish.ABORT):
            self.unforked.discard(slot)
            for branch in range(1, req.sampling.n):
                self.loop.emitter.terminal(req, branch, finish, error)
        program = self.of.get(slot)
        if program is not None:
            row = int(self.loop.table.row[slot])
            ids = self._outputs(slot) if row >= 0 else np.empty(0, np.int32)
            self.events.append((program, ChildDone(slot, req, ids, finish.name.lower())))

    def turn(self) -> None:
        """Run programs on what happened in this turn; their commands may cause more."""
        while self.events:
            batch, self.events = self.events, []
            for program, event in batch:
                for command in program.on(event):
                    self.command(command)
        for slot in [s for s in self.of if s not in self.loop.requests]:
            self.of.pop(slot), self.parked.pop(slot, None)
        self.loop.receiver.sweep()

    def command(self, command: Command) -> None:
        """Carry a command out now, or when its slot settles."""
        slot = command.slot
        if slot not in self.loop.requests:
            return
        if self.loop.table.state[slot] == State.ENDING and not isinstance(command, Fork):
            return  # it ended meanwhile: nothing may follow its last emission, but its KV can still be shared
        if self.loop.table.inflight[slot]:
            self.parked.setdefault(slot, []).append(command)
            return
        self.loop.dirty = True
        match command:
            case Fork():
                self._fork(command)
            case Watch():
                self._watch(slot, command.out)
            case Inject():
                self._inject(slot, command.ids, command.emit)
            case Rewrite():
                self._rewrite(slot, command.keep, command.ids)
            case Pause():
                self._pause(slot, command)
            case Resume():
                self._resume(slot)
            case End():
                if len(command.append):
                    self._inject(slot, command.append, True)
                self.loop.receiver.end(slot, Finish[command.reason.upper()])
            case Drive():
                self.loop.table.lead[slot] = command.lane

    def unpark(self, slots: Ints) -> None:
        """Run commands that waited for these slots to settle."""
        if self.parked:
            for slot in slots.tolist():
                if slot in self.parked and not self.loop.table.inflight[slot]:
                    for command in self.parked.pop(slot):
                        self.command(command)

    def _bind(self, slot: int, program: Program) -> None:
        self.of[slot] = program
        self.loop.table.flags[slot] |= int(Flag.PROGRAM)

    def _outputs(self, slot: int) -> Ints:
        t = self.loop.table
        return self.loop.ids_of(slot, int(t.prompt[slot]), int(t.known[slot])).copy()

    def _watch(self, slot: int, out: int) -> None:
        t = self.loop.table
        limit = int(t.prompt[slot]) + out
        if limit <= t.end[slot]:
            t.limit[slot], t.limit_at[slot] = limit, At.BOUNDARY

    def _fork(self, c: Fork) -> None:
        """A new slot that shares the source's blocks up to ``keep`` ids; without a free seat it queues and finds them by prefix."""
        loop, t, src = self.loop, self.loop.table, c.slot
        self.unforked.discard(src)
        ids = np.concatenate([loop.ids_of(src, 0, c.keep), c.inject]).astype(np.int32)
        dst = loop.receiver.open(c.request)
        if c.keep > t.prompt[dst]:  # else opening the companions on the prompt already left them where they must be
            for companion in loop.companions:
                companion.fork(src, dst, c.request)
                companion.rewind(dst, c.keep)
            loop.cutter.fork(src, dst, c.request, c.keep)
        t.known[dst], t.out[dst] = len(ids), len(ids) - int(t.prompt[dst])
        if len(c.inject):
            self._advance(dst, c.inject)
        if src in self.of:
            self._bind(dst, self.of[src])
        loop.emitter.hits[dst] = min(c.keep, int(t.prompt[dst]))
        if len(loop.running) < loop.config.max_num_seqs:
            shared = min(int(t.computed[src, 0]), c.keep - 1, len(ids) - 1)
            t.move(dst, State.RUNNING)
            loop.kv.fork(src, dst, shared)
            loop.receiver.seat(dst, ids)
            t.computed[dst, 0], t.t_start[dst] = loop.kv.lengths[dst], loop.view.now
        else:
            loop.receiver.held_ids[dst] = ids
            loop.queue.append(dst)

    def _advance(self, slot: int, ids: Ints) -> None:
        """Tell companions about ids that no step produced."""
        new = NewIds(np.array([slot], np.int32), np.array([0, len(ids)], np.int32), ids.astype(np.int32), np.zeros(1, np.uint8))
        for companion in self.loop.companions:
            companion.advance(new)

    def _inject(self, slot: int, ids: Ints, emit: bool) -> None:
        loop, t = self.loop, self.loop.table
        if t.row[slot] < 0:
            raise IllegalTransition(f"slot {slot} has no ids in memory to append to")
        ids = ids[: max(0, int(t.end[slot] - t.known[slot]))]
        if not len(ids):
            return
        loop.arena.ids[t.row[slot], t.known[slot] : t.known[slot] + len(ids)] = ids
        t.known[slot] += len(ids)
        t.out[slot] += len(ids)
        t.last[slot] = ids[-1]
        self._advance(slot, ids)
        if emit:
            loop.emitter.injected(slot, ids)
        if t.known[slot] >= t.end[slot]:
            loop.receiver.end(slot, Finish.LENGTH)

    def _rewrite(self, slot: int, keep: int, ids: Ints) -> None:
        loop, t = self.loop, self.loop.table
        if keep < t.prompt[slot] + loop.emitter.sent(slot):
            raise RequestError("a rewrite may not go below what the client was sent")
        t.known[slot], t.out[slot] = keep, keep - int(t.prompt[slot])
        t.last[slot] = loop.arena.ids[t.row[slot], keep - 1]
        t.fronts.pop(slot, None)
        loop.kv.truncate(slot, min(int(t.computed[slot, 0]), keep - 1))
        t.computed[slot, 0] = loop.kv.lengths[slot]  # 0 if a window group no longer holds what lies before
        for companion in loop.companions:
            companion.rewind(slot, keep)
        if loop.cutter.strings is not None:
            loop.cutter.strings.rewind(slot, keep)
        self._inject(slot, ids, False)

    def _pause(self, slot: int, c: Pause) -> None:
        loop, t = self.loop, self.loop.table
        if t.state[slot] == State.RUNNING:
            t.move(slot, State.HELD)
            t.hold[slot] = c.hold
            loop.running.remove(slot)
            loop._ready = None
        elif t.state[slot] == State.QUEUED:
            t.waits[slot] |= int(Wait.PROGRAM)

    def _resume(self, slot: int) -> None:
        loop, t = self.loop, self.loop.table
        if t.state[slot] == State.HELD:
            t.move(slot, State.RUNNING)
            t.hold[slot] = 0
            loop.running.append(slot)
            loop._ready = None
        t.waits[slot] &= ~int(Wait.PROGRAM) & 0xFFFF
