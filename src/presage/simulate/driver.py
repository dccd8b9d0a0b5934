"""The virtual driver: a heap of what happens when, and the engine's own loops, which cannot tell it from the wall driver.

One thread runs any number of replicas. Time jumps to the next event; events of one replica at one time are one turn. Arrivals are pulled
from the workload as their time comes, so a trace of millions of requests is never in memory at once.

Two things are put off because nobody can see the difference: what arrives while the device is full is handed over together with the
step's end, before it (no plan is made in between); and the plan ahead of a step is made when the step ends, from the state in which it
would have been made, because an arrival would have thrown it away.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from presage.core.errors import ConfigError
from presage.core.events import Arrive, Event, Tick
from presage.core.request import Request
from presage.engine.loop import Loop
from presage.simulate.coalesce import COUNTING, Burst, coalesce, settle
from presage.simulate.collect import RowEmitter
from presage.simulate.executor import ModelledExecutor

Route = Callable[[Request, "Sequence[Replica]"], int]
FIRST = 1e-9
"""The first instant: the table's time 0 means "not yet"."""


@dataclass(slots=True)
class Replica:
    """One engine: its loop, and the two objects in which it differs from a real one."""

    loop: Loop
    executor: ModelledExecutor
    emitter: RowEmitter
    alarm: float = math.inf
    inbox: list[Event] = field(default_factory=list)
    lazy: bool = False
    burst: Burst | None = None
    version: int = 0

    def __post_init__(self) -> None:
        loop = self.loop
        # A policy with a state of its own must see every call that the engine would make.
        self.lazy = loop.config.ahead and type(loop.scheduler) in COUNTING and loop.drafter is None and loop.log.level == "none"
        loop.config.ahead = loop.config.ahead and not self.lazy

    @property
    def full(self) -> bool:
        """Whether a new request could not be launched now."""
        return len(self.executor.flight) >= self.executor.depth and self.loop.side is None

    def plan_ahead(self) -> None:
        """What the loop would have done at the end of the turn that launched the running step, unless something happened since."""
        loop = self.loop
        if not loop.dirty and loop.flight and loop.ahead is None and loop.making is None and (loop.running or loop.queue):
            loop.ahead = loop.schedule(ahead=True)
            loop.dirty = bool(len(loop.ahead.evict))


def _is_event(event: Event | Request | int) -> bool:
    return not isinstance(event, int)


def least_loaded(request: Request, replicas: Sequence[Replica]) -> int:
    """The replica with the fewest requests; the first of equals."""
    loads = [len(r.loop.requests) + len(r.inbox) for r in replicas]
    return loads.index(min(loads))


@dataclass(slots=True)
class VirtualDriver:
    """Runs replicas through a workload.

    ``arrivals``: requests in order of ``arrival``. ``after(request, now)``: more requests, caused by a request that ended (closed loops,
    sessions); their ``arrival`` is not before now. ``post`` schedules any event for a replica. ``route`` sees replicas as they
    are at the time, except that with ``least_loaded``, which looks at nothing that a burst changes, bursts go on.
    """

    replicas: Sequence[Replica]
    arrivals: Iterable[Request]
    route: Route = least_loaded
    after: Callable[[Request, float], Iterable[Request]] | None = None
    bursts: bool = True
    now: float = 0.0
    turns: int = 0
    heap: list[tuple[float, int, int, Event | Request | int]] = field(default_factory=list)
    _seq: int = 0
    _source: Iterator[Request] = field(default_factory=lambda: iter(()))
    _next: Request | None = None

    def __post_init__(self) -> None:
        self._source = iter(self.arrivals)
        for index, replica in enumerate(self.replicas):
            replica.executor.wake = partial(self._wake, index)
            if self.after is not None:
                replica.emitter.ended = self._ended
        self._pull()

    def post(self, at: float, replica: int, event: Event) -> None:
        """Something happens to a replica at a time."""
        self._push(max(at, self.now), replica, event)

    def _wake(self, replica: int, at: float) -> None:
        """A step of the replica ends at ``at``, unless a burst is cut before: then the replica's version is another one."""
        self._push(at, replica, self.replicas[replica].version)

    def _push(self, at: float, replica: int, event: Event | Request | int) -> None:
        self._seq += 1
        heapq.heappush(self.heap, (at, self._seq, replica, event))

    def _pull(self) -> None:
        before = self._next.arrival if self._next is not None else -math.inf
        self._next = next(self._source, None)
        if self._next is not None and self._next.arrival < before:
            raise ConfigError(f"request {self._next.id} arrives at {self._next.arrival}, before the one ahead of it ({before})", param="workload")

    def _ended(self, row: int, request: Request, finish: str) -> None:
        assert self.after is not None
        for more in self.after(request, self.now):
            self._push(max(more.arrival, self.now), -1, more)

    @property
    def next_arrival(self) -> float:
        """When the workload's next request comes; inf at its end."""
        return self._next.arrival if self._next is not None else math.inf

    def run(self, until: float = math.inf, each: Callable[[], None] | None = None) -> None:
        """Turn until nothing is left to happen or ``until``; ``each`` is called about every thousand turns."""
        while self.heap or self._next is not None:
            at = min(self.heap[0][0] if self.heap else math.inf, self.next_arrival)
            if at > until:
                self._cut_all(until)
                return
            self.step(at)
            if each is not None and self.turns % 1024 == 0:
                each()

    def step(self, at: float) -> None:
        """The next thing that happens: arrivals of this instant first, then one replica's events, of which ends of steps come first."""
        self.now = at
        if self._next is not None and self._next.arrival <= at:
            request = self._next
            self._pull()
            self._arrive(request)
            return
        _, _, index, event = heapq.heappop(self.heap)
        if index < 0:
            assert isinstance(event, Request)
            self._arrive(event)
            return
        replica = self.replicas[index]
        events: list[Any] = [event]
        while self.heap and self.heap[0][0] == at and self.heap[0][2] == index:
            events.append(heapq.heappop(self.heap)[3])
        if len(events) > 1:
            events.sort(key=_is_event)
        events = [e for e in events if not isinstance(e, int) or e == replica.version]
        if not events:
            return
        if replica.burst is not None:
            if isinstance(events[0], int) and len(events) == 1:
                settle(replica, replica.burst, at)
                replica.burst = None
            else:
                # The cut posts the end of the running step anew.
                self._cut(index, at)
                events = [e for e in events if not isinstance(e, int)]
        if len(events) == 1 and isinstance(events[0], int) and not replica.inbox:
            if self.bursts and self._burst(index):
                return
            if replica.lazy:
                replica.plan_ahead()
        self._deliver(index, [replica.executor.finish() if isinstance(e, int) else e for e in events])

    def _burst(self, index: int) -> bool:
        """Let the replica's steady steps pass without turns."""
        replica = self.replicas[index]
        soon = self.next_arrival if len(self.replicas) == 1 and self.after is None else math.inf
        replica.burst = coalesce(replica, soon)
        if replica.burst is None:
            return False
        replica.version += 1
        self._wake(index, float(replica.burst.ends[-1]))
        return True

    def _cut(self, index: int, now: float) -> None:
        """Something happens to the replica: its burst ends with the step that is running."""
        replica = self.replicas[index]
        if replica.burst is None:
            return
        settle(replica, replica.burst, now)
        replica.burst = None
        replica.version += 1
        self._wake(index, replica.executor.free_at)

    def _cut_all(self, now: float) -> None:
        for index in range(len(self.replicas)):
            self._cut(index, now)

    def _arrive(self, request: Request) -> None:
        if self.route is not least_loaded:
            self._cut_all(self.now)
        index = self.route(request, self.replicas)
        self._cut(index, self.now)
        replica = self.replicas[index]
        replica.inbox.append(Arrive(request))
        # A deadline is a timer from the moment of arrival on.
        if not replica.full or math.isfinite(request.due_first) or math.isfinite(request.due_end):
            # Not at once: others may arrive at the same instant.
            self._push(self.now, index, Tick())

    def _deliver(self, index: int, events: list[Any]) -> None:
        replica, now = self.replicas[index], max(self.now, FIRST)
        if replica.inbox:
            events, replica.inbox = replica.inbox + events, []
        replica.executor.now = replica.emitter.now = now
        wake = replica.loop.turn(now, events)
        self.turns += 1
        if wake.at < replica.alarm or replica.alarm <= now:
            replica.alarm = wake.at
            if math.isfinite(wake.at):
                self._push(max(wake.at, now), index, Tick())
