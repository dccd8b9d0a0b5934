"""A recorded run once more, in the simulator: its requests, its measured times, and plans that must equal the engine's to the byte.

``engine.replay`` feeds a loop what was recorded, results and cuts included. Here nothing of that is left but what a workload is (requests,
when they came, what they said) and how long each step took: the virtual driver, the modelled executor, the oracle and the cutter do the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from presage.core.config import EngineConfig
from presage.core.errors import ReplayMismatch
from presage.core.events import Arrive, Event
from presage.core.kv import KVGeometry
from presage.core.plan import NewIds, StepDone, StepPlan
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Finish, Floats, Ints
from presage.engine.emitter import Emitter
from presage.engine.replay import Decisions, RecordedNames, decode_event, recorded, replay
from presage.simulate.collect import Collector
from presage.simulate.driver import VirtualDriver
from presage.simulate.executor import ModelledExecutor
from presage.simulate.run import Target, make_replica

END = (1 << 31) - 1
"""The id that ends a reply in place of the recorded one: whatever stopped it (an id, a string, a grammar) is not in the log."""


class Listener(Emitter):
    """Keeps what every branch of every request said, and how it ended. Builds nothing for clients."""

    def __init__(self, table: Table, requests: dict[int, Request]) -> None:
        super().__init__(table, requests, lambda emissions: None)
        self.said: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], Finish] = {}

    def put(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray) -> None:
        """A step's ids, by branch."""
        off, ids = new.off.tolist(), new.ids.tolist()
        for s in np.flatnonzero(live & (np.diff(new.off) > 0)).tolist():
            self._of(int(new.slot[s])).extend(ids[off[s] : off[s + 1]])

    def last(self, slot: int, finish: Finish, stop: int | str | None, error: tuple[str, str, int] | None) -> None:
        """How a branch ended."""
        self.finish[self.requests[slot].id, self.requests[slot].branch] = finish

    def injected(self, slot: int, ids: Ints) -> None:
        """Ids of a program are part of what was said."""
        self._of(slot).extend(ids.tolist())

    def _of(self, slot: int) -> list[int]:
        req = self.requests[slot]
        return self.said.setdefault((req.id, req.branch), req.emitted.tolist())

    def replies(self) -> dict[str, dict[int, Ints]]:
        """Ids by request and branch; END where something other than the length ended them."""
        out: dict[str, dict[int, Ints]] = {}
        for (name, branch), ids in self.said.items():
            if self.finish.get((name, branch)) == Finish.STOP:
                ids = [*ids[:-1], END]
            out.setdefault(name, {})[branch] = np.array(ids, np.int32)
        return out


@dataclass
class RecordedRun:
    """A log as a workload. ``events``: (now, event, whether a step's end stood before it in its turn); ``ends``: now of the turn that took a
    step's result in, by step; ``launches``: now of the turn that launched it; ``names``: block names (level shape)."""

    header: dict[str, Any]
    events: list[tuple[float, Event, bool]] = field(default_factory=list)
    decisions: list[bytes] = field(default_factory=list)
    launches: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    names: list[bytes] = field(default_factory=list)

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration."""
        return EngineConfig.model_validate(self.header["config"])

    @property
    def geometry(self) -> KVGeometry:
        """Its KV pools."""
        return msgspec.convert(self.header["geometry"], KVGeometry)

    def target(self, latency: Any) -> Target:
        """The engine as a target of simulations, with another price of steps."""
        h = self.header
        return Target(latency, self.geometry, h["layers"], h["max_model_len"], eos=(END,), depth=h["depth"])

    @property
    def requests(self) -> list[Request]:
        """The requests as they came, with what they said; arrivals as the loop saw them."""
        found = [(at, e.request) for at, e, _ in self.events if isinstance(e, Arrive)]
        return [msgspec.structs.replace(r, arrival=at) for at, r in found]


def read_run(folder: str | Path) -> RecordedRun:
    """Read a log (level tokens or shape). Raises ReplayMismatch if it does not replay, or holds what no simulation has (faults)."""
    heard: list[Listener] = []

    def listen(table: Table, requests: dict[int, Request]) -> Emitter:
        heard.append(Listener(table, requests))
        return heard[0]

    replay(folder, listen)
    header, frames = recorded(folder)
    run, fresh, replies = RecordedRun(header), [], heard[0].replies()
    for tag, body in frames:
        if tag == "d":
            run.decisions.append(msgspec.msgpack.encode(body))
            fresh.append(body[0])
        elif tag == "i":
            now, events, names, _ = body
            run.names += names
            run.launches.update(dict.fromkeys(fresh, now))
            fresh = []
            _sort(run, now, events, replies)
    return run


def _sort(run: RecordedRun, now: float, events: list[list[Any]], replies: dict[str, dict[int, Ints]]) -> None:
    """Step ends become times, everything else stays an event."""
    after = False
    for body in events:
        if body[0] == "fault":
            raise ReplayMismatch(f"step {body[1]} failed ({body[2]}), which no simulation would")
        if body[0] == "done":
            run.ends[body[1]], after = now, True
            continue
        event = decode_event(body)
        if isinstance(event, Arrive):
            event.request.extras["replies"] = replies.get(event.request.id, {})
        run.events.append((now, event, after))


class TimedExecutor(ModelledExecutor):
    """Steps end when they were measured to end."""

    def __init__(self, ends: dict[int, float], *parts: Any) -> None:
        super().__init__(*parts)
        self.ends = ends

    def submit(self, plan: StepPlan) -> None:
        """A step that was never launched has no time: plans have parted before."""
        if plan.id not in self.ends:
            raise ReplayMismatch(f"step {plan.id} is not in the log", step=plan.id)
        self.free_at = self.ends[plan.id]
        self.flight.append([plan, self.now, self.free_at, 0.0])
        self.wake(self.free_at)


class NoLatency:
    """Nothing asks it: every step has its measured time."""

    def predict(self, features: Floats) -> Floats:
        """Zeros [m, 2]."""
        return np.zeros((len(features), 2))

    def observe(self, facts: Any) -> None:
        """Nothing is learnt."""


def rerun(folder: str | Path) -> int:
    """Simulate a recorded run with its measured step times; returns how many plans were compared.

    Raises ReplayMismatch with the first plan that differs.
    """
    run, check = read_run(folder), Decisions()
    parts: dict[str, Any] = {"log": lambda: check}
    if run.header["level"] == "shape":
        names = RecordedNames()
        names.names = list(run.names)
        parts["content"] = lambda: names
    replica = make_replica(
        run.config, run.target(NoLatency()), Collector(timeline=False), parts=parts, executor=lambda *made: TimedExecutor(run.ends, *made)
    )
    driver = VirtualDriver([replica], (), bursts=False)
    for at, event, after in run.events:
        # What the engine found in its inbox before a step's end comes just before it, what it found behind it at the same instant.
        driver.post(at if after else math.nextafter(at, -math.inf), 0, event)
    try:
        driver.run()
    except ReplayMismatch:
        _compare(check.made, run.decisions)
        raise
    _compare(check.made, run.decisions)
    return len(run.decisions)


def _compare(made: Sequence[bytes], wanted: Sequence[bytes]) -> None:
    for i, (ours, theirs) in enumerate(zip(made, wanted)):
        if ours != theirs:
            raise ReplayMismatch(f"plan {i} of the simulator differs from the engine's", step=i)
    if len(made) < len(wanted):
        raise ReplayMismatch(f"the simulator made {len(made)} plans, the engine {len(wanted)}", step=len(made))


def kinds(run: RecordedRun) -> Counter[str]:
    """What happened in a run, by the name of the event."""
    return Counter(type(event).__name__ for _, event, _ in run.events)
