"""The loop: a pure, non-blocking state machine, ``turn(now, events) -> Wake``. It reads no clock, never sleeps, starts no thread.

receive -> admit (``receive.py``) -> schedule -> draft -> execute -> verify -> emit (here). A driver waits, in wall or virtual time.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.core.plan import Budget, Draft, Facts, Grants, Moves, NewIds, StepDone, StepFault, StepPlan, Wake
from presage.core.protocols import Companion, Drafter, Executor, KVCache, LatencyModel, LengthController, Scheduler
from presage.core.request import Request
from presage.core.table import Arena, Table
from presage.core.types import Finish, Flag, Ints, Longs, State, Want
from presage.engine.bind import bind, frontier
from presage.engine.check import check_grants
from presage.engine.cutter import Cutter
from presage.engine.emitter import Emitter
from presage.engine.kernels import DEAD, ENDED, NODES, REACHED, RECTANGLE, commit, mark, unmark
from presage.engine.log import NullLog
from presage.engine.programs import Programs
from presage.engine.receive import Receiver
from presage.engine.speculation import SpeculationStats
from presage.engine.staircase import advance
from presage.engine.view import View
from presage.schedule.fcfs import Fcfs

_GRAMMAR, _EXIT, _SAMPLE = int(Flag.GRAMMAR), int(Want.EXIT), int(Want.SAMPLE)
_QUEUED, _RUNNING = int(State.QUEUED), int(State.RUNNING)

COUNTERS = (
    "preemptions", "generated", "computed", "finished", "policy_errors", "faults", "drafts", "drafted", "accepted", "step_seconds",
    "predicted_seconds",
)  # fmt: skip


@dataclass(slots=True)
class Flight:
    """A step between submit and settle. ``side``: it decides no ids; ``drafter``: a drafter asked for it."""

    plan: StepPlan
    grants: Grants
    draft: Draft
    side: bool = False
    drafter: bool = False


@dataclass(slots=True)
class LoopConfig:
    """What the loop itself needs to know. ``tables``: whether plans carry block tables (no modelled executor reads them)."""

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    max_waiting: int = 2048
    max_model_len: int = 2048
    max_drafts: int = 0
    ahead: bool = True
    rule: str = "keyed"
    tables: bool = True


class Loop:
    """Owns the table and the id arena; everything else is a policy, a companion or the executor.

    ``turn`` is the only entry point while running. ``emitter.flush`` is called by the driver after each turn, off the critical path.
    """

    def __init__(
        self,
        config: LoopConfig,
        executor: Executor,
        kv: Sequence[KVCache],
        scheduler: Scheduler,
        cutter: Cutter,
        emitter: Emitter,
        *,
        table: Table,
        requests: dict[int, Request],
        companions: Sequence[Companion] = (),
        drafter: Drafter | None = None,
        length: LengthController | None = None,
        masker: Any = None,
        latency: LatencyModel | None = None,
        log: Any = None,
    ) -> None:
        self.config, self.executor, self.lanes, self.kv = config, executor, tuple(kv), kv[0]
        self.scheduler, self.fallback, self.cutter, self.emitter = scheduler, Fcfs(), cutter, emitter
        self.table, self.requests = table, requests
        parts: tuple[Any, ...] = (scheduler if hasattr(scheduler, "open") else None, drafter, masker)  # policies may follow who sits where
        self.companions: tuple[Companion, ...] = (*companions, *executor.companions(), *(p for p in parts if p))
        self.speculation = SpeculationStats()
        self.drafter, self.length, self.masker, self.latency = drafter, length, masker, latency
        self.log = log or NullLog()
        self.arena = Arena(config.max_num_seqs + 1, config.max_model_len + 1)
        self.budget = Budget(tokens=config.max_num_batched_tokens, spans=config.max_num_seqs, drafts=config.max_drafts)
        self.view = View(table, executor.layers, config.max_num_seqs, self.kv.geometry.num_blocks, latency)
        self.receiver, self.programs = Receiver(self), Programs(self)
        self.running: list[int] = []
        self.queue = array("i")  # as numbers, not as objects: it is read every plan, and thousands may wait
        self._ready: Ints | None = None
        self.flight: dict[int, Flight] = {}
        self.ahead: Grants | None = None
        self.making: Generator[StepPlan, StepDone | None, None] | None = None
        self.reply: StepDone | None = None
        self.side: int | None = None
        self.row_moves: list[tuple[Ints, Longs, Longs]] = []
        self.unpinned = False
        self.dirty = True
        self.draining = False
        self.steps = 0
        self.stats: dict[str, float] = dict.fromkeys(COUNTERS, 0)

    # ---- the turn

    def turn(self, now: float, events: Sequence[Any]) -> Wake:
        """Take in events, settle finished steps, launch what can be launched, plan one step ahead. Returns when to call again."""
        self.log.open(now, events)
        self.view.now = now
        for event in events:
            if isinstance(event, StepDone):
                self.settle(event)
            elif isinstance(event, StepFault):
                self.fault(event)
            else:
                self.receiver.on(event)
        self.receiver.expire(now)
        self.programs.turn()
        if self.dirty:
            self.executor.cut()
        while len(self.flight) < self.executor.depth and self.side is None:
            if self.making is None:
                grants = self.take_ahead()
                if grants is None:
                    break
                self.making = self.make(grants)
            if not self.resume():
                break
        if self.flight and self.making is None and self.ahead is None and self.config.ahead and (self.running or self.queue):
            # Whether this plan is used is decided at launch: `dirty` then says that something it could not foresee happened.
            self.ahead, self.dirty = self.schedule(ahead=True), False
            # Who would be evicted may end in the step that is running: decide that with the result in hand.
            self.dirty = bool(len(self.ahead.evict))
        return self.log.close(self, Wake(self.receiver.soonest(), bool(self.flight)))

    def resume(self) -> bool:
        """Drive the step being made: False if it waits for a forward pass of its own drafter."""
        assert self.making is not None
        try:
            work = self.making.send(self.reply) if self.reply is not None else next(self.making)
            self.reply = None
        except StopIteration:
            self.making, self.reply = None, None
            return True
        if work.id < 0:
            self._drafter_pass(work)
        self.side = work.id
        self.executor.submit(work)
        return False

    def _drafter_pass(self, plan: StepPlan) -> None:
        """Number a drafter's own pass and keep its slots in place while it runs."""
        plan.id, self.steps = self.steps, self.steps + 1
        self.log.passed(plan)
        if plan.lane == 0:
            plan.moves = self._with_rows(plan.moves)  # it reads the rows that the last step's accepted paths are to be moved to
        self.table.inflight[plan.slot] += 1
        self.flight[plan.id] = Flight(plan, Grants.of([], [], self.executor.layers), plan.draft, side=True, drafter=True)

    @property
    def idle(self) -> bool:
        """Nothing running, queued, held or in flight."""
        return not self.requests and not self.flight and self.making is None

    def ready(self) -> Ints:
        """RUNNING slots in admission order."""
        if self._ready is None:
            self._ready = np.array(self.running, np.int32)
        return self._ready

    # ---- schedule

    def take_ahead(self) -> Grants | None:
        """The plan made while the last step ran, pruned to what is still launchable; a fresh plan if it cannot be used."""
        plan, self.ahead = self.ahead, None
        if plan is not None and not self.dirty:
            ok = self.launchable(plan)
            plan = plan if ok.all() else plan.select(ok)
            if len(plan):
                return plan
        if not self.running and not self.queue:
            return None
        plan = self.schedule(ahead=False)
        self.dirty = False
        if not len(plan) and not self.flight:
            plan = self.receiver.unstall(plan)
        return plan if len(plan) else None

    def schedule(self, ahead: bool) -> Grants:
        """Ask the policies for one step. A policy that raises or lies costs this step, never a request."""
        self.receiver.rematch()
        queue = np.array(self.queue, np.int32)
        if len(queue):
            queue = queue[self.table.waits[queue] == 0]
        try:
            grants = self._plan(self.scheduler, queue, ahead)
        except Exception as error:
            self.stats["policy_errors"] += 1
            self.log.note("policy_error", repr(error))
            grants = self._plan(self.fallback, queue, ahead)
        grants.epoch = self.table.epoch[grants.slot]
        return grants

    def _plan(self, policy: Scheduler, queue: Ints, ahead: bool) -> Grants:
        view = self.view.project(self.ready(), queue, self.kv.ledger(), ahead)
        view.step = self.steps
        if self.drafter is not None and self.length is not None:
            self.table.ask[:] = 0
            ask = self.length.ask(view, self.log.hinted(self.drafter.hint(view)))
            self.table.ask[: len(ask)] = np.minimum(ask, np.maximum(self.table.limit - view.known - 1, 0)[: len(ask)])
        grants = policy.plan(view, self.budget)
        check_grants(grants, view, self.budget, self.lanes)
        return grants

    def launchable(self, g: Grants) -> np.ndarray:
        """Same occupant, not held, not busy, and still with a gap."""
        t, s = self.table, g.slot
        state = t.state[s]
        queued = (state == _QUEUED) & (t.waits[s] == 0)
        running = (state == _RUNNING) & (t.inflight[s] == 0)
        return np.asarray((t.epoch[s] == g.epoch) & (queued | running))

    # ---- draft, execute

    def make(self, g: Grants) -> Generator[StepPlan, StepDone | None, None]:
        """Evict, take blocks, draft, bind, launch. A generator: a model drafter yields its own passes and gets their results."""
        if len(g.evict):
            self.receiver.evict(g.evict)
        if (self.table.state[g.slot] != _RUNNING).any():
            self.receiver.admit(g)
            self.unpinned = True  # until blocks are taken below, perhaps only in a later step
            g = g.select(self.table.state[g.slot] == _RUNNING)
        lead = g.lane == self.table.lead[g.slot]
        if not lead.all():
            for lane in sorted(set(g.lane[~lead].tolist())):
                yield from self._lane_pass(g.select(~lead & (g.lane == lane)), int(lane))
            g = g.select(lead)
        if not len(g):
            return
        draft, step = Draft.none(len(g)), self.steps
        if self.drafter is not None and g.draft.any():
            known = self.table.known[g.slot]
            draft = yield from self.drafter.propose(self.view, g)  # type: ignore[misc]
            draft = self.log.proposed(self.masker.prune(draft, g) if self.masker is not None else draft)
            # While it computed, a program may have rewritten a slot that had no row in its passes.
            g, draft = self._select(g, draft, self.table.known[g.slot] == known)
        if not len(g):
            return
        upto = frontier(self.table, g, 0)
        if len(draft):
            upto += np.diff(draft.offset)
        if self.steps > step and not self._fits(g.slot, upto):
            return
        moves = self.kv.apply(g.slot, upto)
        if self.unpinned:
            g, draft = self._held(g, draft)
            if not len(g):
                return
        plan = bind(self.steps, 0, self.table, self.arena, self.kv, g, draft, self._with_rows(moves), self.executor.layers, self.config.tables)
        plan.rule = self.config.rule
        self.launch(plan, g, draft)

    def _fits(self, slots: Ints, upto: Ints) -> bool:
        """Whether what was priced before the drafter's passes still fits: a fork meanwhile makes tails shared, and their copies cost blocks."""
        ledger = self.kv.ledger()
        fits = bool((ledger.need(slots, upto).sum(0) <= ledger.free).all())
        self.dirty |= not fits
        return fits

    def _held(self, g: Grants, draft: Draft) -> tuple[Grants, Draft]:
        """A prefix hit that lost blocks since it was found is shorter now: that slot is planned again from what it really has."""
        t = self.table
        short = self.kv.lengths[g.slot] < t.computed[g.slot, 0]
        running = self.ready()
        self.unpinned = bool((self.kv.lengths[running] < t.computed[running, 0]).any())
        if not short.any():
            return g, draft
        t.computed[g.slot[short], 0] = self.kv.lengths[g.slot[short]]
        from presage.draft.prune import keep_nodes

        return g.select(~short), keep_nodes(draft, np.ones(len(draft), np.bool_), ~short)

    def _select(self, g: Grants, draft: Draft, same: np.ndarray) -> tuple[Grants, Draft]:
        from presage.draft.prune import keep_nodes  # only with a drafter

        assert self.length is not None
        keep = self.length.select(self.view, g, draft)
        ok = self.launchable(g) & ~keep.hold & same
        return g.select(ok), keep_nodes(draft, keep.node, ok)

    def _lane_pass(self, g: Grants, lane: int) -> Generator[StepPlan, StepDone | None, None]:
        """Catch a lagging lane up on known ids: KV only, nothing sampled."""
        kv = self.lanes[lane]
        moves = kv.apply(g.slot, frontier(self.table, g, lane))
        plan = bind(self.steps, lane, self.table, self.arena, kv, g, Draft.none(len(g)), moves, self.executor.layers, self.config.tables)
        plan.want[:] = int(Want.NONE)
        self.steps += 1
        self.table.inflight[g.slot] += 1
        self.flight[plan.id] = Flight(plan, g, plan.draft, side=True)
        yield plan

    def launch(self, plan: StepPlan, g: Grants, draft: Draft) -> None:
        """Mark the slots and submit."""
        t, s = self.table, plan.slot
        mark(
            s,
            plan.start,
            plan.count,
            plan.nodes,
            plan.layer0,
            plan.layer1,
            self.executor.layers,
            plan.want,
            t.inflight,
            t.pending,
            t.flying,
            plan.features,
        )
        plan.features[10] = len(plan.moves)
        if self.latency is not None:
            plan.predicted = float(self.latency.predict(plan.features[None])[0, 0])
        plan.late = self.masker.late(plan) if self.masker is not None and (t.flags[s] & _GRAMMAR).any() else None
        self.flight[plan.id] = Flight(plan, g, draft)
        self.steps += 1
        self.log.decided(self, plan, g)
        self.executor.submit(plan)
        if plan.late is not None:
            plan.late.fill()

    # ---- verify, emit

    def settle(self, done: StepDone) -> None:
        """Take in a finished step: cut at stops, commit KV and ids, tell companions and observers, hand new ids to the emitter."""
        flight = self.flight.pop(done.plan)
        plan, t = flight.plan, self.table
        if flight.side:
            t.inflight[plan.slot] -= 1
            self._settle_side(flight, done)
            return
        live = np.empty(len(plan.slot), np.bool_)
        unmark(
            plan.slot, plan.count, plan.nodes, plan.layer1, self.executor.layers, plan.want, flight.grants.epoch, t.inflight, t.pending, t.flying,
            t.epoch, t.state, live,
        )  # fmt: skip
        new = self.cutter.cut(plan, done, live)
        todo = self._commit(plan, done, new, live)
        for companion in self.companions:
            companion.advance(new)
        if self.masker is not None:
            todo |= self._finish_grammars(plan, new)
        self.stats["step_seconds"] += done.t1 - done.t0
        self.stats["predicted_seconds"] += plan.predicted
        self.stats["generated"] += len(new.ids)
        self.stats["computed"] += int(plan.rows[-1])
        facts = Facts(plan, flight.grants, flight.draft, done, new)
        self.scheduler.observe(facts)
        if self.latency is not None:
            self.latency.observe(facts)
        if self.length is not None:
            self.length.observe(facts)
        self.log.settled(self, facts)
        self._emit(plan, done, new, live, todo)

    def _commit(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray) -> int:
        t, s, layers = self.table, plan.slot, self.executor.layers
        reached = np.empty(len(s), np.int32)
        todo = commit(
            s, plan.start, plan.count, plan.nodes, plan.layer0, plan.layer1, layers, plan.want, done.path_off, new.off, new.ids, new.finish, live,
            t.row, self.arena.ids, t.known, t.out, t.last, t.computed, t.kind, t.limit, t.flags, reached,
        )  # fmt: skip
        if todo & RECTANGLE:
            self._climb(plan, live)
        if todo & NODES:
            self._compact(plan, done, np.flatnonzero(live & (plan.nodes > 0)).astype(np.int32))
        if todo & (RECTANGLE | DEAD):
            s = s[live]
            reached = t.computed[s, 0]
        self.kv.commit(s, reached, self.ids_of)
        return int(todo)

    def _climb(self, plan: StepPlan, live: np.ndarray) -> None:
        """Rectangles that are not whole stacks move the staircase."""
        t, layers = self.table, self.executor.layers
        for i in np.flatnonzero(live & ((plan.layer0 != 0) | (plan.layer1 != layers))).tolist():
            slot, a = int(plan.slot[i]), int(plan.start[i])
            c, fronts = advance(int(t.computed[slot, 0]), t.fronts.get(slot, []), a, a + int(plan.count[i]), int(plan.layer1[i]), layers)
            # The newest id of a generating request has no KV yet, whatever the rectangle reached.
            t.computed[slot, 0] = min(c, int(t.known[slot]) - 1) if plan.want[i] & _SAMPLE else c
            t.fronts.pop(slot, None)
            if fronts:
                t.fronts[slot] = fronts

    def _compact(self, plan: StepPlan, done: StepDone, spans: Ints) -> None:
        """Scattered accepted rows move behind the computed ones before the next walk; rejected rows lose their blocks."""
        for i in spans.tolist():
            slot, base = int(plan.slot[i]), int(plan.start[i] + plan.count[i])
            path = done.path[done.path_off[i] : done.path_off[i + 1]].tolist()
            pairs = [(base + n, base + k) for k, n in enumerate(path) if n != k]
            if pairs:
                self._move_rows(slot, np.array(pairs, np.int32))
            self.kv.truncate(slot, int(self.table.computed[slot, 0]))
        self.stats["drafts"] += len(spans)
        self.stats["drafted"] += int(plan.nodes.sum())
        self.stats["accepted"] += len(done.path)
        self.speculation.add(plan, done)

    def _move_rows(self, slot: int, pairs: Ints) -> None:
        """Note row copies as physical slots: the blocks may belong to someone else when the next plan is bound."""
        for g, table in enumerate(self.kv.tables):
            block = self.kv.geometry.groups[g].block_tokens
            place = table[slot, pairs // block].astype(np.int64) * block + pairs % block
            self.row_moves.append((np.full(len(pairs), g, np.int32), place[:, 0], place[:, 1]))

    def _with_rows(self, moves: Moves) -> Moves:
        if self.row_moves:
            group, src, dst = (np.concatenate(part) for part in zip(*self.row_moves))
            moves.row_group, moves.row_src, moves.row_dst, self.row_moves = group, src, dst, []
        return moves

    def _finish_grammars(self, plan: StepPlan, new: NewIds) -> int:
        counts, todo = np.diff(new.off), 0
        for i in np.flatnonzero(((self.table.flags[plan.slot] & _GRAMMAR) > 0) & (counts > 0) & (new.finish == 0)).tolist():
            if self.masker.terminated(int(plan.slot[i])):
                new.finish[i], todo = Finish.STOP, ENDED
        return todo

    def _emit(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray, todo: int) -> None:
        t, s, now = self.table, plan.slot, self.view.now
        if len(new.ids):
            got = s[new.off[1:] > new.off[:-1]]
            t.due_next[got] = now
            fresh = got[t.t_first[got] == 0]
            if len(fresh):
                t.t_first[fresh] = now
        self.emitter.put(plan, done, new, live)
        if todo & ENDED:
            pooled = live & ((plan.want & _EXIT) > 0)
            for i in np.flatnonzero((live & (new.finish > 0)) | pooled).tolist():
                finish = Finish(int(new.finish[i])) if new.finish[i] else Finish.DONE
                self.receiver.end(int(s[i]), finish, new.stop.get(i))
        if todo & REACHED:
            for slot in s[live & (t.known[s] >= t.limit[s])].tolist():
                self.programs.reached(slot)
        self.programs.unpark(s)

    def _settle_side(self, flight: Flight, done: StepDone) -> None:
        self.side, self.reply = None, done
        plan, lane = flight.plan, flight.plan.lane
        # A drafter's pass through some of the target's layers commits nothing, nor does one over drafted tokens.
        live = (self.table.state[plan.slot] == State.RUNNING) & (plan.count > 0) & (not flight.drafter or lane > 0)
        self.table.computed[plan.slot[live], lane] = (plan.start + plan.count)[live]
        self.lanes[lane].commit(plan.slot[live], self.table.computed[plan.slot[live], lane], self.ids_of)
        self.programs.unpark(plan.slot)

    def fault(self, event: StepFault) -> None:
        """A step that raised: its slots end with the error, the rest go on."""
        flight = self.flight.pop(event.plan, None)
        if flight is None:
            return
        self.stats["faults"] += 1
        plan, t = flight.plan, self.table
        t.inflight[plan.slot] -= 1
        t.pending[plan.slot] = 0
        t.flying[plan.slot] = 0
        self.making, self.side, self.reply, self.dirty = None, None, None, True
        bad = set(event.slots.tolist())
        if flight.drafter:
            self._undraft(plan, bad)
            return
        for slot in plan.slot.tolist():
            if slot in bad and self.table.state[slot] == State.RUNNING:
                self.receiver.end(slot, Finish.ERROR, None, ("step_failed", event.error, 500))
            elif self.table.state[slot] == State.RUNNING:
                # It shared a step with the faulty one: what that step wrote is not trusted, so it starts over from its known ids.
                self.receiver.evict(np.array([slot], np.int32))
        self.programs.unpark(plan.slot)

    def _undraft(self, plan: StepPlan, bad: set[int]) -> None:
        """A drafter's pass raised: its requests lose what that lane holds of them, and the faulty ones their drafts; nobody ends."""
        for slot in plan.slot.tolist():
            if plan.lane:
                self.lanes[plan.lane].drop(slot)
            elif self.table.state[slot] == State.RUNNING:
                self.receiver.evict(np.array([slot], np.int32))
            if self.drafter is not None and slot in bad:
                self.drafter.close(slot)
        self.programs.unpark(plan.slot)

    # ---- shared with the receiver and programs

    def ids_of(self, slot: int, a: int, b: int) -> Ints:
        """Known ids [a, b) of a running slot."""
        return np.asarray(self.arena.ids[self.table.row[slot], a:b])
