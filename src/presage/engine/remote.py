"""The engine as another process: start it, watch it, restart it, and hand its tokens to whoever asked, exactly once.

HTTP lives in the front's process because a busy Python thread may keep the interpreter for 5 ms, several steps of a small model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from presage.core.config import EngineConfig
from presage.core.errors import EngineDead, PresageError
from presage.core.request import Emission, Request
from presage.draft.settings import parse_speculative
from presage.engine.assemble import error_of
from presage.engine.journal import Journal
from presage.engine.streams import until_ended
from presage.engine.wire import pack, unpack

RESTARTS, WITHIN = 5, 120.0
CLOSING_SECONDS, FLUSH_SECONDS = 10.0, 2.0
_log = logging.getLogger("presage.front")


class RemoteEngine:
    """Implements the front's engine client. ``await start()`` returns when the engine is ready, or raises its typed error."""

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.journal = config, Journal()
        self.folder = tempfile.TemporaryDirectory(prefix="presage-")
        self.generation, self.ready, self.closing = 0, asyncio.Event(), False
        self.process: subprocess.Popen[bytes] | None = None
        self.info: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.beat = 0.0
        self.deaths: deque[float] = deque()
        self.failure: PresageError | None = None
        self.flushes: dict[int, asyncio.Event] = {}
        self.context = zmq.asyncio.Context()
        self.commands: Any = None
        self.inbox: Any = None
        self.task: asyncio.Task[None] | None = None
        self.tokenizer: Any = None
        self.model_names: list[str] = []
        self.max_model_len = self.vocab_size = 0
        self.drafting = parse_speculative(config.speculation.speculative_config) is not None
        self.eos_ids: list[int] = []

    async def start(self) -> None:
        """Start the engine process and wait until it serves."""
        self._spawn()
        self.task = asyncio.create_task(self._run(), name="presage-engine-watch")
        waiting = asyncio.create_task(self.ready.wait())
        await asyncio.wait({waiting, self.task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.failure is not None:
            raise self.failure
        from presage.tokenize.tokenizer import Tokenizer

        m = self.config.model
        self.tokenizer = Tokenizer.load(m.tokenizer or self.info["path"], chat_template=m.chat_template)
        self.model_names = list(m.served_model_name) or [m.model]
        self.max_model_len, self.vocab_size, self.eos_ids = self.info["max_model_len"], self.info["vocab_size"], self.info["eos_ids"]

    @property
    def chat_template(self) -> Any:
        """The model's chat template, or None."""
        return self.tokenizer.chat_template

    async def submit(self, request: Request) -> AsyncIterator[Emission]:
        """Queue a request and yield its emissions until every branch ended. Abandoning the iterator aborts the request."""
        if self.failure is not None:
            raise self.failure
        entry = self.journal.open(request)
        self._send("add", request)
        ended = False
        try:
            async for emission in until_ended(entry.queue, request.sampling.n):
                yield emission
            ended = True
        except PresageError:
            ended = True
            raise
        finally:
            self.journal.close(request.id)
            if not ended:
                self._send("abort", request.id)

    async def abort(self, request_id: str) -> None:
        """End a request in any state; unknown ids are ignored."""
        self._send("abort", request_id)

    async def health(self) -> bool:
        """Whether the engine process is up and beating."""
        return self.failure is None and self.ready.is_set() and time.monotonic() - self.beat < 10

    def stats(self) -> dict[str, Any]:
        """The engine's last heartbeat, with the number of restarts."""
        return {**self.last, "engine_restarts": self.generation - 1}

    async def decision_log(self) -> str | None:
        """Folder of the decision log, written out but for what an engine that does not answer holds back; None without one."""
        folder = self.config.observability.log_folder
        if folder is not None:
            done = asyncio.Event()
            number = id(done)
            self.flushes[number] = done
            self._send("flush", number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), FLUSH_SECONDS)
            self.flushes.pop(number, None)
        return folder

    async def drain(self) -> None:
        """Wait until the requests in the journal ended; the front takes no new ones meanwhile."""
        while self.journal.entries and self.failure is None:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Stop the process: ask, and kill it if it does not within ``CLOSING_SECONDS``: its drafter may have files to write. Once is enough."""
        if self.closing:
            return
        self.closing = True
        self._send("stop", None)
        if self.task is not None:
            self.task.cancel()
        process = self.process
        if process is not None:
            for _ in range(int(CLOSING_SECONDS / 0.02)):
                if process.poll() is not None:
                    break
                await asyncio.sleep(0.02)
            else:
                process.kill()
                process.wait()
        self.context.destroy(linger=0)
        self.folder.cleanup()

    def _send(self, tag: str, body: Any) -> None:
        # While no engine is up the journal is the queue: whatever was not sent is resubmitted when the next one is ready.
        if self.ready.is_set() and self.commands is not None:
            self.commands.send(pack(tag, body))

    def _spawn(self) -> None:
        self.generation += 1
        for socket in (self.commands, self.inbox):
            if socket is not None:
                socket.close(linger=0)
        paths = [f"ipc://{Path(self.folder.name) / f'{name}{self.generation}'}" for name in ("in", "out")]
        self.commands, self.inbox = self.context.socket(zmq.PUSH), self.context.socket(zmq.PULL)
        for socket, path in zip((self.commands, self.inbox), paths):
            socket.set_hwm(0)
            socket.bind(path)
        command = [sys.executable, "-m", "presage.engine.worker", *paths]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        assert self.process.stdin is not None
        self.process.stdin.write(self.config.model_dump_json().encode())
        self.process.stdin.close()

    async def _run(self) -> None:
        """Receive for ever; a process that ended is replaced, unless it never came up or ends too often."""
        while not self.closing:
            if await self.inbox.poll(100):
                self._receive(*unpack(await self.inbox.recv()))
                if self.failure is not None:
                    return
            elif not self.closing and self.process is not None and self.process.poll() is not None:
                await self._restart(self.process.returncode)
                if self.failure is not None:
                    return

    def _receive(self, tag: str, body: Any) -> None:
        match tag:
            case "out":
                self.journal.deliver(body)
            case "beat":
                self.last, self.beat = body, time.monotonic()
            case "ready":
                self.info, self.beat = body[0], time.monotonic()
                self.ready.set()
                if self.generation > 1:
                    for request in self.journal.resumed():
                        self._send("add", request)
            case "flushed":
                if body in self.flushes:
                    self.flushes[body].set()
            case "failed":
                self._fail(error_of((body[0], body[1], body[2])))

    async def _restart(self, code: int) -> None:
        now = time.monotonic()
        self.deaths.append(now)
        while self.deaths and now - self.deaths[0] > WITHIN:
            self.deaths.popleft()
        if not self.ready.is_set() and self.generation == 1:
            self._fail(EngineDead(f"the engine process ended with status {code} before it was ready"))
        elif len(self.deaths) > RESTARTS:
            self._fail(EngineDead(f"the engine process ended {len(self.deaths)} times within {WITHIN:.0f} s; last status {code}"))
        else:
            _log.warning("the engine process ended with status %s; restarting, %d requests in the journal", code, len(self.journal.entries))
            self.ready.clear()
            self._spawn()

    def _fail(self, error: PresageError) -> None:
        self.failure = error
        self.journal.fail(error)
