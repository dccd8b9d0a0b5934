"""The engine process: one loop behind two sockets. Started by ``engine.remote``; ends when its parent does.

python -m presage.engine.worker COMMANDS EMISSIONS      (the configuration as JSON on standard input)
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import msgspec
import zmq

from presage.core.config import EngineConfig
from presage.core.errors import PresageError
from presage.core.events import Drain, ResetCache
from presage.core.request import Emission
from presage.engine.wire import pack, unpack

HEARTBEAT = 0.25
_log = logging.getLogger("presage.engine")


class Worker:
    """Commands in (``add``, ``abort``, ``drain``, ``reset``, ``flush``, ``stop``), emissions and heartbeats out."""

    def __init__(self, commands: str, emissions: str) -> None:
        self.context = zmq.Context(1)
        self.commands = self.context.socket(zmq.PULL)
        self.out = self.context.socket(zmq.PUSH)
        for socket, address in ((self.commands, commands), (self.out, emissions)):
            # Nothing may be dropped: memory is bounded by the queue limit, which refuses requests before they pile up here.
            socket.set_hwm(0)
            socket.connect(address)
        self.lock = threading.Lock()
        self.parent = os.getppid()
        self.engine: Any = None

    def send(self, tag: str, body: Any) -> None:
        """Thread-safe: the loop's thread emits, the command thread beats."""
        frame = pack(tag, body)
        with self.lock:
            self.out.send(frame)

    def emit(self, emissions: list[Emission]) -> None:
        """The loop's sink."""
        self.send("out", emissions)

    def serve(self, config: EngineConfig) -> None:
        """Build the engine and run it until ``stop`` or the parent's end."""
        from presage.engine.build import build_engine

        threading.Thread(target=self.watch, name="presage-parent", daemon=True).start()
        began = time.monotonic()
        try:
            self.engine = build_engine(config, self.emit, progress=True)
        except PresageError as error:
            self.send("failed", [error.code, error.message, error.status])
            return
        self.send("ready", [msgspec.to_builtins(self.info()), time.monotonic() - began])
        threading.Thread(target=self.listen, name="presage-commands", daemon=True).start()
        self.engine.driver.run()
        self.engine.close()

    def flush(self, number: int) -> None:
        """Write the decision log out and say so; in the loop's thread."""
        self.engine.loop.log.flush()
        self.send("flushed", number)

    def watch(self) -> None:
        """End with the parent, also while the model loads: nobody else would."""
        while os.getppid() == self.parent:
            time.sleep(1.0)
        os._exit(0)

    def info(self) -> dict[str, Any]:
        """The model's facts, for the front."""
        i = self.engine.info
        return {name: getattr(i, name) for name in i.__slots__}

    def listen(self) -> None:
        """Take commands; beat."""
        beat = 0.0
        while True:
            try:
                if self.commands.poll(int(HEARTBEAT * 1000)):
                    self.command(*unpack(self.commands.recv()))
            except zmq.ZMQError:  # the process is ending and took the socket away
                return
            now = time.monotonic()
            if now - beat >= HEARTBEAT:
                beat = now
                try:
                    self.send("beat", self.engine.stats())
                except RuntimeError:  # a counter changed size while it was read; the next beat is near
                    continue

    def command(self, tag: str, body: Any) -> None:
        """Carry out one command."""
        driver = self.engine.driver
        match tag:
            case "add":
                self.engine.add(body)
            case "abort":
                self.engine.abort(body)
            case "drain":
                driver.post(Drain())
            case "reset":
                driver.post(ResetCache())
            case "flush":
                driver.call(lambda: self.flush(body))
            case "stop":
                driver.stop()


def main() -> None:
    """Entry point of the process."""
    from presage.kernels.cpu.environment import prepare_environment

    prepare_environment()
    for number in (signal.SIGINT, signal.SIGTERM):  # both may go to the whole group; the front drains and then says stop
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("PRESAGE_LOGGING_LEVEL", "INFO").upper(), format="%(levelname)s %(name)s: %(message)s")
    worker = Worker(sys.argv[1], sys.argv[2])
    worker.serve(EngineConfig.model_validate_json(sys.stdin.read()))
    worker.context.destroy(linger=1000)


if __name__ == "__main__":
    main()
