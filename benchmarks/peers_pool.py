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

    def can(self, case: str) -> bool:
        """Can it be asked for a case? Single steps only where the engine lets one make them."""
        return self.kind in ("presage", "llama.cpp") or not case.startswith("verify")

    @property
    def own(self) -> bool:
        """Is it ours?"""
        return self.kind in ("presage", "linear")


class EngineFailed(Exception):
    """An engine did not start, ended, or could not answer."""


class Worker:
    """An engine's process. Raises EngineFailed with the end of its log."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec, self.log, self.used, self.disturbed = spec, log, time.monotonic(), 0.0
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
        """The value of a method. ``disturbed`` is then the share of all cores that anyone else used meanwhile."""
        time.sleep(SETTLE)
        assert self.process.stdin is not None
        (busy, total), mine = machine_ticks(), process_ticks(self.process.pid)
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        value = self._answer()["value"]
        (busy_after, total_after), mine_after = machine_ticks(), process_ticks(self.process.pid)
        self.disturbed = max(0.0, busy_after - busy - (mine_after - mine)) / max(1, total_after - total)
        self.used = time.monotonic()
        return value

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


def machine_ticks() -> tuple[int, int]:
    """(ticks in which a core was busy, or taken away by the host; all ticks) since the machine started; zeros where Linux is not."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def process_ticks(pid: int) -> int:
    """Ticks that a process, its threads and its ended children have used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(word) for word in fields[11:15])


def busy(seconds: float = 1.0) -> float:
    """Share of all cores in use right now: numbers taken beside others mean little."""
    before, start = machine_ticks()
    time.sleep(seconds)
    after, stop = machine_ticks()
    return round((after - before) / max(1, stop - start), 3)


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
