"""The engines of a comparison: each a process, started when a figure needs it, stopped when memory runs short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("peers_worker.py")
SETTLE = 0.4
"""Seconds before a question: threads of the engine asked before must have gone to sleep (OpenMP's spin up to 0.2 s)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start an engine: ``kind`` (a name in ``peers_worker.ENGINES``), ``variant`` (its precision), interpreter, model."""

    kind: str
    variant: str
    python: str
    model: str

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.kind} {self.variant}"

    @property
    def own(self) -> bool:
        """Is it ours?"""
        return self.kind in ("presage", "linear")


class EngineFailed(Exception):
    """An engine did not start, ended, or could not answer."""


class Worker:
    """An engine's process. Raises EngineFailed with the end of its log."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec, self.log, self.used = spec, log, time.monotonic()
        # Peers run in environments of their own, where our path would shadow packages.
        environment = os.environ if spec.own else {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [spec.python, str(WORKER), spec.kind, spec.model, spec.variant]
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment)
            )
        began = time.perf_counter()
        self.version = str(self._answer()["version"])
        self.loading = time.perf_counter() - began

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise EngineFailed(f"{self.spec.name} ended: {' | '.join(tail)}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise EngineFailed(f"{self.spec.name}: {found['error']}")
        return found

    def ask(self, method: str, *arguments: Any) -> Any:
        """The value of a method."""
        time.sleep(SETTLE)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        self.used = time.monotonic()
        return self._answer()["value"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


class Pool:
    """Engines by spec. ``room``: bytes of memory that must be available before another is started."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room
        self.live: dict[Spec, Worker] = {}
        self.versions: dict[str, str] = {}

    def get(self, spec: Spec, keep: Iterable[Spec] = ()) -> Worker:
        """The engine's process; others than ``keep`` may be stopped to make room, the longest unused first."""
        worker = self.live.get(spec)
        if worker is None:
            idle = sorted((w for s, w in self.live.items() if s not in set(keep)), key=lambda w: w.used)
            while idle and available_memory() < self.room:
                self.stop(idle.pop(0).spec)
            print(f"starting {spec.name}", file=sys.stderr, flush=True)
            log = self.folder / (spec.name.replace(" ", "-").replace("/", "-") + ".log")
            worker = self.live[spec] = Worker(spec, log)
            if spec.model != "-":
                self.versions[spec.kind] = worker.version
        return worker

    def stop(self, spec: Spec) -> None:
        """End an engine."""
        if (worker := self.live.pop(spec, None)) is not None:
            worker.close()

    def close(self) -> None:
        """End all."""
        for spec in list(self.live):
            self.stop(spec)


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
