"""The wall driver: waits for events, calls ``turn``, then lets the emitter build what clients get while the next step runs."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable

from presage.core.events import Event
from presage.core.plan import Wake
from presage.engine.loop import Loop

_log = logging.getLogger("presage.engine")
AUDIT_EVERY = 1.0


class WallDriver:
    """Runs a loop in the calling thread. ``post`` may be called from any thread; ``stop`` ends ``run`` after the current turn."""

    def __init__(self, loop: Loop, clock: Callable[[], float] = time.monotonic) -> None:
        self.loop, self.clock = loop, clock
        self.inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.wake = Wake(math.inf, False)
        self.stopped = False
        self.audited = 0.0
        loop.executor.start(self.post)

    def post(self, event: Event) -> None:
        """Hand an event to the loop."""
        self.inbox.put(event)

    def call(self, work: Callable[[], None]) -> None:
        """Have something done by the thread that runs the loop, after its next turn; from any thread. It must be short and not raise."""
        self.calls.put(work)
        self.inbox.put(None)

    def stop(self) -> None:
        """Make ``run`` return."""
        self.stopped = True
        self.inbox.put(None)

    def step(self, block: bool = True) -> bool:
        """One turn: wait for events if ``block``, take them all, turn, emit. False if there was nothing to do."""
        events = self._take(block)
        if not events and not block:
            return False
        self.wake = self.loop.turn(self.clock(), events)
        self.loop.emitter.flush()
        while not self.calls.empty():
            self.calls.get()()
        if self.loop.idle:
            self._rest()
        return True

    def run(self) -> None:
        """Turn until ``stop``."""
        while not self.stopped:
            self.step()
        self.loop.log.shut()

    def _take(self, block: bool) -> list[Event]:
        events: list[Event] = []
        if block:
            timeout = None if math.isinf(self.wake.at) else max(0.0, self.wake.at - self.clock())
            try:
                first = self.inbox.get(timeout=timeout)
            except queue.Empty:
                return events
            if first is not None:
                events.append(first)
        while True:
            try:
                event = self.inbox.get_nowait()
            except queue.Empty:
                return events
            if event is not None:
                events.append(event)

    def _rest(self) -> None:
        """Idle: check the invariants (at most once a second) and write the log out."""
        now = self.clock()
        if now - self.audited > AUDIT_EVERY:
            self.audited = now
            self.loop.receiver.audit()
            self.loop.log.flush()
