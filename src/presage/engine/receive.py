"""Receive and admit: arrivals, aborts, waits and deadlines; moving slots between queue, running and ending. The loop's bookkeeping half."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from presage.core.errors import AuditFailed, ContextTooLong, DeadlineMissed, Draining, NeverFits, Overloaded, PresageError, RequestError
from presage.core.events import Abort, Annotate, Arrive, Drain, Prioritise, ResetCache, Tick, Waited
from presage.core.plan import Grants
from presage.core.protocols import Companion
from presage.core.request import Request
from presage.core.types import EMPTY, Finish, Flag, Ints, Kind, State, Wait

if TYPE_CHECKING:
    from presage.engine.loop import Loop

WAIT_SECONDS = {Wait.GRAMMAR: 60.0, Wait.ADAPTER: 60.0, Wait.KV_IN: 30.0, Wait.SCORE: 1.0, Wait.QUOTA: 60.0, Wait.WEIGHTS: 120.0}
PROBED, EXACT = 128, 16
"""Requests at the head of the queue whose prefix hits follow the cache: as far as they grow, and (``EXACT``) shrink."""
# Python 3.11 looks an enum's member up by name each time (0.6 us): the hot paths keep numbers.
_QUEUED, _RUNNING, _ENDING, _FREE = (int(s) for s in (State.QUEUED, State.RUNNING, State.ENDING, State.FREE))
_EMBED, _PREFILL, _PLP = int(Kind.EMBED), int(Kind.PREFILL), int(Flag.PROMPT_LOGPROBS)


class Receiver:
    """Handlers for everything that is not a finished step."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.table, self.requests = loop, loop.table, loop.requests
        self.by_id: dict[str, list[int]] = {}
        self.held_ids: dict[int, Ints] = {}
        self.ending: list[int] = []
        self.timers: list[tuple[float, int, int, int]] = []
        self.matched: dict[int, int] = {}
        self.probed = -1
        self.tenants: dict[str, int] = {}
        self.seq = 0

    def on(self, event: Any) -> None:
        """Dispatch one event."""
        match event:
            case Arrive():
                self.arrive(event.request, event.wait)
            case Abort():
                self._all(event.id, lambda slot: self.end(slot, Finish.ABORT))
            case Waited():
                self._all(event.id, lambda slot: self._waited(slot, event))
            case Annotate():
                self._all(event.id, lambda slot: self._annotate(slot, event))
            case Prioritise():
                self._all(event.id, lambda slot: self.table.priority.__setitem__(slot, event.priority))
            case Drain():
                self.loop.draining = True
            case ResetCache():
                for kv in self.loop.lanes:
                    kv.reset()
                self.matched.clear()
            case Tick():
                return
        self.loop.dirty = True

    # ---- receive

    def arrive(self, req: Request, wait: Wait) -> None:
        """Judge an arrival: refused requests get one terminal emission and take no slot."""
        try:
            self._judge(req)
        except PresageError as error:
            self._refuse(req, error)
            return
        if len(req.emitted) and len(req.prompt) + len(req.emitted) >= self._end(req):
            # Resumed with everything it may have: only its end was lost.
            self.loop.emitter.terminal(req, req.branch, Finish.LENGTH, None)
            return
        try:
            slot = self.open(req, wait)
        except PresageError as error:
            self._refuse(req, error)
            return
        self._park(slot, wait)
        self.held_ids[slot] = np.concatenate([req.prompt, req.emitted]).astype(np.int32) if len(req.emitted) else req.prompt
        self.loop.queue.append(slot)
        self.match(slot)
        self.loop.programs.started(slot, req)

    def _refuse(self, req: Request, error: PresageError) -> None:
        for branch in range(max(1, req.sampling.n)):
            self.loop.emitter.refuse(req, branch, error)

    def _judge(self, req: Request) -> None:
        loop, n = self.loop, len(req.prompt)
        if loop.draining:
            raise Draining("the server is shutting down", retry_after=5)
        if len(loop.queue) >= loop.config.max_waiting:
            raise Overloaded(f"the queue is full ({loop.config.max_waiting} requests)", retry_after=self._retry_after())
        if n == 0:
            raise ContextTooLong("the prompt is empty", param="prompt", n_prompt_tokens=0, n_ctx=loop.config.max_model_len)
        room = loop.config.max_model_len - (req.kind <= _PREFILL)
        if n > room:
            raise ContextTooLong(
                f"the prompt has {n} tokens; this model's context is {loop.config.max_model_len} including at least one output token",
                param="prompt",
                n_prompt_tokens=n,
                n_ctx=loop.config.max_model_len,
            )
        if req.sampling.n > 1 and req.sampling.thinking_budget is not None:
            raise RequestError("thinking_budget works with n = 1 only", param="thinking_budget")
        for kv in loop.lanes:
            for g, total in zip(kv.geometry.groups, kv.geometry.num_blocks):
                top = self._end(req) if not g.window else min(self._end(req), g.window + loop.config.max_num_batched_tokens + g.block_tokens)
                if g.blocks(top) > total - 1:
                    raise NeverFits(f"the request may need {g.blocks(top)} KV blocks and the whole cache has {total - 1}; lower max_tokens")

    def _retry_after(self) -> float:
        steps = max(1, self.loop.steps)
        return float(min(60, max(1, round(len(self.loop.queue) * self.loop.stats["step_seconds"] / steps))))

    def _end(self, req: Request) -> int:
        if req.kind > _PREFILL:
            return len(req.prompt)
        new = 1 if req.kind is Kind.PREFILL else (req.sampling.max_tokens or self.loop.config.max_model_len)
        return min(len(req.prompt) + new, self.loop.config.max_model_len)

    def open(self, req: Request, wait: Wait = Wait.NONE) -> int:
        """Give the request a slot, its columns and its companions (the masker when its grammar is ready)."""
        t, slot = self.table, self.table.take()
        t.move(slot, State.QUEUED)
        self.requests[slot] = req
        self.by_id.setdefault(req.id, []).append(slot)
        t.prompt[slot], t.out[slot] = len(req.prompt), len(req.emitted)
        t.known[slot] = len(req.prompt) + len(req.emitted)
        t.end[slot] = t.limit[slot] = self._end(req)
        t.kind[slot], t.priority[slot], t.arrival[slot] = req.kind, req.priority, req.arrival
        t.due_first[slot], t.due_end[slot] = req.due_first, req.due_end
        t.tenant[slot] = self.tenants.setdefault(req.tenant, len(self.tenants))
        t.seq[slot], self.seq = self.seq, self.seq + 1
        t.flags[slot] = self.loop.cutter.open(slot, req)
        deadline = min(req.due_first, req.due_end)
        if math.isfinite(deadline):
            heapq.heappush(self.timers, (deadline, slot, int(t.epoch[slot]), 0))
        for kv in self.loop.lanes:
            kv.open(slot, req)
        opened: list[Companion] = []
        try:
            for companion in self.loop.companions:
                if companion is not self.loop.masker or Wait.GRAMMAR not in wait:
                    companion.open(slot, req)
                    opened.append(companion)
        except PresageError:
            # A companion refused (an id outside the vocabulary, a grammar) and keeps nothing: nor may the others.
            t.move(slot, State.ENDING)
            self._free(slot, opened)
            raise
        return slot

    def _park(self, slot: int, wait: Wait) -> None:
        self.table.waits[slot] = int(wait)
        for bit in Wait:
            if bit and bit in wait:
                due = self.loop.view.now + WAIT_SECONDS.get(bit, math.inf)
                heapq.heappush(self.timers, (due, slot, int(self.table.epoch[slot]), int(bit)))

    def _waited(self, slot: int, event: Waited) -> None:
        if event.error is not None:
            self.end(slot, Finish.ERROR, None, event.error)
            return
        if event.bit is Wait.GRAMMAR and self.loop.masker is not None:
            try:
                self.loop.masker.open(slot, self.requests[slot])
            except PresageError as error:
                self.end(slot, Finish.ERROR, None, (error.code, error.message, error.status))
                return
        self.table.waits[slot] &= ~int(event.bit) & 0xFFFF

    def _annotate(self, slot: int, event: Annotate) -> None:
        getattr(self.table, event.column)[slot] = event.value
        self.table.waits[slot] &= ~int(Wait.SCORE) & 0xFFFF

    def _all(self, request_id: str, do: Any) -> None:
        for slot in list(self.by_id.get(request_id, ())):
            do(slot)

    # ---- time

    def soonest(self) -> float:
        """When the next wait or deadline ends; inf if none."""
        return self.timers[0][0] if self.timers else math.inf

    def expire(self, now: float) -> None:
        """Refuse late: waits that timed out, requests whose deadline passed before their first token."""
        while self.timers and self.timers[0][0] <= now:
            _, slot, epoch, bit = heapq.heappop(self.timers)
            if self.table.epoch[slot] != epoch or self.table.state[slot] in (State.FREE, State.ENDING):
                continue
            if not bit:
                if self.table.out[slot] == 0 or now >= self.table.due_end[slot]:
                    late = DeadlineMissed("the request's deadline passed before it was served")
                    self.end(slot, Finish.ERROR, None, (late.code, late.message, late.status))
                elif math.isfinite(self.table.due_end[slot]):
                    heapq.heappush(self.timers, (float(self.table.due_end[slot]), slot, epoch, 0))
            elif self.table.waits[slot] & bit:
                if bit == Wait.SCORE:
                    self.table.waits[slot] &= ~bit & 0xFFFF
                else:
                    self.end(slot, Finish.ERROR, None, ("wait_timeout", f"timed out waiting for {Wait(bit).name}", 503))
            self.loop.dirty = True

    # ---- admit, evict, end

    def rematch(self) -> None:
        """Look prefix hits up again for the head of the queue when the cache changed.

        Walking a hit again costs 2 us and more, so behind the first few requests only hits that have grown are: a burst that shares a prefix
        would else be let in with the hits it arrived with. Older ones shrink when they are used.
        """
        loop = self.loop
        version, room = loop.kv.version, loop.config.max_num_seqs - len(loop.running)
        if room <= 0 or not loop.queue:
            return
        todo = [slot for slot in loop.queue[: min(EXACT, room)] if self.matched.get(slot) != version]
        if version != self.probed:
            todo += loop.kv.grown(np.array(loop.queue[EXACT : min(PROBED, room)], np.int32))
            self.probed = version
        for slot in todo:
            self.match(slot)

    def match(self, slot: int) -> None:
        """Prefix hit of one queued slot. Requests for prompt log-probabilities or pooling need every position computed."""
        t = self.table
        free = t.kind[slot] == _EMBED or t.flags[slot] & _PLP
        ids = self.held_ids[slot]
        t.hit[slot] = 0 if free else self.loop.kv.match(slot, ids)
        self.matched[slot] = self.loop.kv.version

    def admit(self, g: Grants) -> None:
        """QUEUED -> RUNNING for the granted slots: an arena row, the prefix hit, a place at the end of the running order."""
        t, loop = self.table, self.loop
        for slot in g.slot[t.state[g.slot] == _QUEUED].tolist():
            if t.waits[slot]:
                continue
            # The hit is the one the plan was made with: a longer one found now would make its grant reach past the known ids.
            t.move(slot, State.RUNNING)
            loop.queue.remove(slot)
            self.seat(slot, self.held_ids.pop(slot))
            t.computed[slot, 0] = t.hit[slot]
            self.matched.pop(slot, None)
            if t.t_start[slot] == 0:
                t.t_start[slot] = loop.view.now
                loop.emitter.hits[slot] = int(t.hit[slot])

    def seat(self, slot: int, ids: Ints) -> None:
        """Copy a slot's known ids into a fresh arena row and put it into the running order."""
        t, loop = self.table, self.loop
        t.row[slot] = loop.arena.take()
        loop.arena.ids[t.row[slot], : len(ids)] = ids
        t.last[slot] = ids[-1]
        loop.running.append(slot)
        loop._ready = None

    def evict(self, slots: Ints) -> None:
        """RUNNING -> QUEUED: blocks go back, outputs and companions stay; the slot keeps its arrival place in the queue."""
        t, loop = self.table, self.loop
        for slot in slots.tolist():
            if t.state[slot] != State.RUNNING or t.inflight[slot]:
                continue
            t.move(slot, State.QUEUED)
            self._unseat(slot, keep=True)
            t.preempted[slot] += 1
            loop.stats["preemptions"] += 1
            seqs = t.seq[loop.queue] if loop.queue else EMPTY
            loop.queue.insert(int(np.searchsorted(seqs, t.seq[slot])), slot)

    def _unseat(self, slot: int, keep: bool) -> None:
        t, loop = self.table, self.loop
        if keep:
            self.held_ids[slot] = loop.arena.ids[t.row[slot], : t.known[slot]].copy()
            for kv in loop.lanes:
                kv.drop(slot)
        if t.row[slot] >= 0:
            loop.arena.give(int(t.row[slot]))
        t.row[slot], t.computed[slot], t.hit[slot] = -1, 0, 0
        t.fronts.pop(slot, None)
        self.matched.pop(slot, None)
        if slot in loop.running:
            loop.running.remove(slot)
            loop._ready = None

    def end(self, slot: int, finish: Finish, stop: int | str | None = None, error: tuple[str, str, int] | None = None) -> None:
        """Idempotent: one terminal emission, then ENDING until nothing is in flight."""
        t, loop = self.table, self.loop
        if t.state[slot] in (_FREE, _ENDING):
            return
        queued = t.state[slot] == _QUEUED
        t.move(slot, State.ENDING)
        if queued:
            loop.queue.remove(slot)
            if t.waits[slot] & int(Wait.GRAMMAR) and loop.masker is not None:
                loop.masker.cancel(self.requests[slot].id)
        elif slot in loop.running:
            loop.running.remove(slot)
            loop._ready = None
        loop.stats["finished"] += 1
        loop.emitter.last(slot, finish, stop, error)
        loop.programs.ended(slot, finish, error)
        self.ending.append(slot)
        loop.log.ended(loop, slot, finish)

    def sweep(self) -> None:
        """ENDING -> FREE for slots that no step holds any more."""
        if not self.ending:
            return
        left = []
        for slot in self.ending:
            if self.table.inflight[slot] or self.table.pins[slot]:
                left.append(slot)
                continue
            self._free(slot, self.loop.companions)
        self.ending = left

    def _free(self, slot: int, companions: Sequence[Companion]) -> None:
        """ENDING -> FREE: everything that was the slot's goes back once. ``companions``: those that know it."""
        self._unseat(slot, keep=False)
        self.held_ids.pop(slot, None)
        for kv in self.loop.lanes:
            kv.close(slot)
        for companion in companions:
            companion.close(slot)
        self.loop.cutter.close(slot)
        req = self.requests.pop(slot)
        self.by_id[req.id].remove(slot)
        if not self.by_id[req.id]:
            del self.by_id[req.id]
        self.table.move(slot, State.FREE)

    def unstall(self, plan: Grants) -> Grants:
        """Nothing was granted and nothing is in flight: take held memory back, then let the fallback plan, then refuse the head."""
        loop, t = self.loop, self.table
        for slot in t.slots(State.HELD).tolist():
            if t.computed[slot, 0] and not t.inflight[slot]:
                t.move(slot, State.QUEUED)
                self._unseat(slot, keep=True)
                self._park(slot, Wait.PROGRAM)
                loop.queue.append(slot)
        able = [s for s in loop.queue if not t.waits[s]]
        if not loop.running and not able:
            return plan
        queue = np.array(able, np.int32)
        plan = loop._plan(loop.fallback, queue, False)
        plan.epoch = t.epoch[plan.slot]
        if not len(plan):
            head = loop.running[0] if loop.running else able[0]
            self.end(head, Finish.ERROR, None, ("policy_stall", "the scheduler could not make progress with this request", 500))
        return plan

    def audit(self) -> None:
        """Check the loop's invariants when idle. Raises AuditFailed naming what leaked."""
        loop, t = self.loop, self.table
        live = np.array(sorted(self.requests), np.int32)
        for kv in loop.lanes:
            kv.audit(live)
        places = sorted([*loop.running, *loop.queue, *self.ending, *t.slots(State.HELD).tolist()])
        if places != live.tolist():
            raise AuditFailed(f"live slots {live.tolist()} but queue, running, held and ending hold {places}")
        if not loop.flight and (t.inflight.any() or t.pending[live].any() or t.flying[live].any()):
            raise AuditFailed("a slot is marked in flight while nothing is")
        if not live.size and (self.by_id or self.held_ids or t.fronts or len(loop.arena._free) != len(loop.arena.ids)):
            raise AuditFailed("the loop is empty but remembers a request")
