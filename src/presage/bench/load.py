"""The open-loop generator: every request is sent when the schedule says so, however slow the server is.

The schedule is fixed before anything is sent, and bytes are made before they are due. Only the later turns of a session have no time of
their own: they are due their think time after the turn before ended. How late the generator itself was is part of every result.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from presage.bench.client import StreamReader
from presage.bench.measures import Record
from presage.bench.pace import realtime
from presage.bench.wire import Pool
from presage.core.errors import ConfigError


@dataclass(slots=True)
class Job:
    """One request to send. ``body(history)`` makes its JSON; ``history`` are (own prompt, answer) of the turns before it in its session.

    ``at`` seconds from the start; for a job ``after`` another one (an index, -1 = none), ``think`` seconds after that one ended.
    """

    body: Callable[[Sequence[str]], bytes]
    at: float = 0.0
    after: int = -1
    think: float = 0.0
    tenant: str = ""
    session: int = -1
    turn: int = 0
    key: str | None = None


@dataclass(slots=True)
class Run:
    """What a run left: records in the order of its jobs, the client's share of a core, whether it had real-time priority."""

    records: list[Record]
    cpu_share: float = 0.0
    realtime: bool = False
    interrupted: bool = False


@dataclass(slots=True)
class Limits:
    """Bounds of a run. ``concurrency``: requests in flight at most (0 = any number); ``timeout`` seconds a request may take."""

    concurrency: int = 0
    timeout: float = 6 * 3600.0
    realtime: bool = False


@dataclass(slots=True)
class _Live:
    reader: StreamReader
    timer: asyncio.TimerHandle | None = None
    stop: Callable[[str], None] = lambda error: None


@dataclass(slots=True)
class Generator:
    """Sends ``jobs`` over a pool; ``headers`` go with every request. One use: ``run``."""

    pool: Pool
    jobs: Sequence[Job]
    headers: dict[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    on_end: Callable[[Record], None] = lambda record: None
    heap: list[tuple[float, int]] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    live: dict[int, _Live] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    left: int = 0
    stopped: bool = False
    _start: float = 0.0
    _answers: dict[int, str] = field(default_factory=dict)
    _followers: dict[int, list[int]] = field(default_factory=dict)
    _ready: dict[int, bytes] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None
    _done: asyncio.Future[None] | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> Run:
        """Send everything; ends with the last answer, or at Ctrl-C with what there is. Raises ConfigError if the server is not there."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._link()
        try:
            await self.pool.warm()
        except OSError as error:
            raise ConfigError(f"no connection to {self.pool.host}:{self.pool.port}: {error}", param="base_url") from None
        self._prepare()
        # What exists now will live to the end: the collector need not look at it again in the middle of the run.
        gc.collect()
        gc.freeze()
        try:
            with realtime(self.limits.realtime) as got, _interruptible(loop, self.stop):
                self._begin()
                cpu, wall = time.process_time(), time.monotonic()
                self._due()
                await self._done
                share = (time.process_time() - cpu) / max(1e-9, time.monotonic() - wall)
        finally:
            gc.unfreeze()
            self.pool.close()
        return Run([r for r in self.records if not (self.stopped and math.isnan(r.t_send))], share, got, self.stopped)

    def _link(self) -> None:
        for row, job in enumerate(self.jobs):
            if job.after < 0:
                heapq.heappush(self.heap, (job.at, row))
            else:
                self._followers.setdefault(job.after, []).append(row)
            self.records.append(Record(math.nan, tenant=job.tenant, session=job.session, turn=job.turn))
        self.left = len(self.jobs)

    def _begin(self) -> None:
        self._start = time.monotonic()
        for job, record in zip(self.jobs, self.records):
            record.t_sched = self._start + job.at if job.after < 0 else math.nan

    def _due(self) -> None:
        """Send what is due, make ready what comes next, and come back when it is due."""
        heap, now = self.heap, time.monotonic() - self._start
        while heap and heap[0][0] <= now:
            self._fire(heapq.heappop(heap)[1])
        self._prepare()
        self._arm()
        if not self.left and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _prepare(self) -> None:
        if self.heap and (row := self.heap[0][1]) not in self._ready:
            self._ready[row] = self.request(row)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._start + self.heap[0][0], self._due) if self.heap else None

    def request(self, row: int) -> bytes:
        """The bytes of a request."""
        job = self.jobs[row]
        body = job.body(self._history(job))
        fields = {"Host": self.pool.authority, "Content-Type": "application/json", "Accept": "text/event-stream", **self.headers}
        if job.key is not None:
            fields["Authorization"] = f"Bearer {job.key}"
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"POST {self.pool.path} HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _history(self, job: Job) -> list[str]:
        """Answers of the turns before, oldest first."""
        found: list[str] = []
        at = job.after
        while at >= 0:
            found.append(self._answers.get(at, ""))
            at = self.jobs[at].after
        return found[::-1]

    def _fire(self, row: int) -> None:
        """It is due: send it, or let it wait for a seat."""
        if self.limits.concurrency and len(self.live) >= self.limits.concurrency:
            self.waiting.append(row)
            self._ready.pop(row, None)
        else:
            self._send(row)

    def _send(self, row: int) -> None:
        record, data = self.records[row], self._ready.pop(row, None) or self.request(row)
        live = self.live[row] = _Live(StreamReader(record, lambda reader: self._ended(row, reader), row in self._followers))
        live.timer = asyncio.get_running_loop().call_later(self.limits.timeout, self._late, row)
        connection = self.pool.take()
        if connection is not None:
            live.stop = connection.fail
            record.t_send = connection.send(data, live.reader)
            return
        task = asyncio.get_running_loop().create_task(self._send_anew(row, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_anew(self, row: int, data: bytes) -> None:
        """Over a connection that must be made first."""
        live, record = self.live[row], self.records[row]
        try:
            connection = await self.pool.connect()
        except OSError as error:
            record.t_send = time.monotonic()
            if row in self.live:
                live.reader.end(f"no connection: {error}")
            return
        if row not in self.live:
            connection.transport.abort()
            return
        live.stop = connection.fail
        record.t_send = connection.send(data, live.reader)

    def _late(self, row: int) -> None:
        if row in self.live:
            live = self.live[row]
            live.stop(f"timeout after {self.limits.timeout:g} s")
            if row in self.live:
                live.reader.end(f"timeout after {self.limits.timeout:g} s")

    def _ended(self, row: int, reader: StreamReader) -> None:
        live = self.live.pop(row)
        if live.timer is not None:
            live.timer.cancel()
        self.left -= 1
        record = self.records[row]
        self.on_end(record)
        if reader.keep_text:
            self._answers[row] = reader.text
        for follower in self._followers.get(row, ()):
            self._follow(follower, record)
        if self.waiting:
            freed = self.waiting.popleft()
            self.records[freed].held = time.monotonic() - self.records[freed].t_sched
            self._send(freed)
        self._due()

    def _follow(self, row: int, before: Record) -> None:
        job, record, now = self.jobs[row], self.records[row], time.monotonic()
        if self.stopped:
            return
        if before.ok:
            record.t_sched = max(now, before.t_done + job.think)
            heapq.heappush(self.heap, (record.t_sched - self._start, row))
            return
        record.t_sched = now
        record.error = "not sent: the turn before it failed"
        self.left -= 1
        for later in self._followers.get(row, ()):
            self._follow(later, record)

    def stop(self) -> None:
        """Send nothing more; what is in flight ends as aborted."""
        self.stopped, self.left = True, len(self.live)
        self.heap.clear()
        self.waiting.clear()
        for row, live in [*self.live.items()]:
            live.stop("aborted")
            if row in self.live:
                live.reader.end("aborted")
        self._due()


@contextlib.contextmanager
def _interruptible(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``stop`` where the platform and the thread allow it."""
    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except (ValueError, RuntimeError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def progress(total: int) -> Callable[[Record], None]:
    """A counter on a terminal: one short line, since a drawn bar would itself make the generator late."""
    if not sys.stderr.isatty():
        return lambda record: None
    done, shown = 0, 0.0

    def tick(record: Record) -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if now - shown > 0.5 or done == total:
            shown = now
            sys.stderr.write(f"\r{done}/{total} requests" + ("\n" if done == total else ""))
            sys.stderr.flush()

    return tick
