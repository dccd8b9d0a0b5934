"""A recorded run once more, in the simulator: its requests, its measured times, and plans that must equal the engine's to the byte.

``engine.replay`` feeds a loop what was recorded, results and cuts included. Here nothing of that is left but what a workload is (requests,
when they came, what they said), when steps began and ended, and what a drafter answered: the virtual driver, the modelled executor, the oracle
and the cutter do the rest. Drafts come true as far as they equal what the request said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from presage import verify
from presage.cache.manager import block_managers
from presage.core.config import EngineConfig
from presage.core.errors import ReplayMismatch
from presage.core.events import Arrive, Event, Tick
from presage.core.kv import KVGeometry
from presage.core.plan import NewIds, StepDone, StepPlan, Verdict
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Finish, Floats, Ints, Want
from presage.draft.settings import parse_speculative
from presage.engine.answers import Entry, RecordedAnswers
from presage.engine.emitter import Emitter
from presage.engine.replay import Decisions, RecordedNames, decode_event, geometries, loop_config, recorded, recorded_parts, replay
from presage.simulate.collect import Collector
from presage.simulate.driver import VirtualDriver
from presage.simulate.executor import ModelledExecutor
from presage.simulate.oracle import TraceOracle
from presage.simulate.run import Target, make_replica

END = (1 << 31) - 1
"""The id that ends a reply in place of the recorded one: whatever stopped it (an id, a string, a grammar) is not in the log."""


Said = dict[str, dict[int, Ints]]
"""Ids by request and branch."""


class Listener(Emitter):
    """Keeps what every branch of every request said, and how it ended. Builds nothing for clients."""

    def __init__(self, table: Table, requests: dict[int, Request]) -> None:
        super().__init__(table, requests, lambda emissions: None)
        self.said: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], Finish] = {}
        self.behind: dict[tuple[str, int], list[int]] = {}

    def put(self, plan: StepPlan, done: StepDone, new: NewIds, live: np.ndarray) -> None:
        """A step's ids, by branch. Accepted drafts behind a stop are what the model would have gone on with."""
        off, ids, kept = new.off.tolist(), new.ids.tolist(), np.diff(new.off)
        for s in np.flatnonzero(live & (kept > 0)).tolist():
            self.said[self._key(int(new.slot[s]))].extend(ids[off[s] : off[s + 1]])
        if len(done.path):
            for s in np.flatnonzero(np.diff(done.path_off) > kept).tolist():
                path = done.path[done.path_off[s] + kept[s] : done.path_off[s + 1]]
                self.behind[self._key(int(new.slot[s]))] = plan.draft.token[plan.draft.offset[s] + path].tolist()

    def last(self, slot: int, finish: Finish, stop: int | str | None, error: tuple[str, str, int] | None) -> None:
        """How a branch ended."""
        self.finish[self._key(slot)] = finish

    def injected(self, slot: int, ids: Ints) -> None:
        """Ids of a program are part of what was said."""
        self.said[self._key(slot)].extend(ids.tolist())

    def _key(self, slot: int) -> tuple[str, int]:
        """Request and branch in a slot. What the client had before is part of what it says."""
        req = self.requests[slot]
        self.said.setdefault((req.id, req.branch), req.emitted.tolist())
        return req.id, req.branch

    def replies(self) -> Said:
        """Ids by request and branch; END where something other than the length ended them."""
        stopped = {key for key, finish in self.finish.items() if finish == Finish.STOP}
        return _by_branch({key: [*ids[:-1], END] if key in stopped else ids for key, ids in self.said.items()})

    def truth(self) -> Said:
        """What the model said by request and branch, the id that ended it and those behind it included as far as they are known."""
        return _by_branch({key: [*ids, *self.behind.get(key, [])] for key, ids in self.said.items()})


def _by_branch(said: dict[tuple[str, int], list[int]]) -> Said:
    out: Said = {}
    for (name, branch), ids in said.items():
        out.setdefault(name, {})[branch] = np.array(ids, np.int32)
    return out


@dataclass
class RecordedRun:
    """A log as a workload. ``events``: (now, event, whether a step's end stood before it in its turn); ``turns``: now of each.

    By step: ``ends``, now of the turn that took its result in; ``done``, the result (ids are not in it); ``launches``, now of the turn that
    launched it. ``names``: block names (level shape). ``answers``: what companions answered.
    """

    header: dict[str, Any]
    events: list[tuple[float, Event, bool]] = field(default_factory=list)
    decisions: list[bytes] = field(default_factory=list)
    launches: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    names: list[bytes] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    done: dict[int, StepDone] = field(default_factory=dict)
    answers: list[Entry] = field(default_factory=list)

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration."""
        return EngineConfig.model_validate(self.header["config"])

    @property
    def geometry(self) -> KVGeometry:
        """Its KV pools."""
        return geometries(self.header)[0]

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
    run, fresh, said = RecordedRun(header), [], (heard[0].replies(), heard[0].truth())
    for tag, body in frames:
        if tag == "d":
            run.decisions.append(msgspec.msgpack.encode(body))
            fresh.append(body[0])
        elif tag == "c":
            run.answers += body
        elif tag == "i":
            now, events, names, _ = body
            run.names += names
            run.turns.append(now)
            run.launches.update(dict.fromkeys(fresh, now))
            fresh = []
            _sort(run, now, events, *said)
    return run


def _sort(run: RecordedRun, now: float, events: list[list[Any]], replies: Said, truth: Said) -> None:
    """Step ends become times, everything else stays an event."""
    after = False
    for body in events:
        if body[0] == "fault":
            raise ReplayMismatch(f"step {body[1]} failed ({body[2]}), which no simulation would")
        event = decode_event(body)
        if isinstance(event, StepDone):
            run.ends[event.plan], run.done[event.plan], after = now, event, True
            continue
        if isinstance(event, Arrive):
            req = event.request
            req.extras.update(replies=replies.get(req.id, {}), truth=truth.get(req.id, {}))
            # What ended a reply stands in it as END, which min_tokens must not hold back.
            event = Arrive(msgspec.structs.replace(req, sampling=msgspec.structs.replace(req.sampling, min_tokens=0)), event.wait)
        run.events.append((now, event, after))


class TimedExecutor(ModelledExecutor):
    """Steps end when the engine took their results in, and took as long as they were measured to."""

    def __init__(self, run: RecordedRun, *parts: Any) -> None:
        super().__init__(*parts)
        self.run = run

    def submit(self, plan: StepPlan) -> None:
        """A step that was never launched has no time: plans have parted before."""
        if plan.id not in self.run.ends:
            raise ReplayMismatch(f"step {plan.id} is not in the log", step=plan.id)
        done, self.free_at = self.run.done[plan.id], self.run.ends[plan.id]
        self.flight.append([plan, done.t0, done.t1, 0.0])
        self.wake(self.free_at)


class RecordedOracle(TraceOracle):
    """Says what each request said. Drafts come true as far as they equal it if ``walks``; else as far as they did when they were recorded."""

    def __init__(self, run: RecordedRun) -> None:
        super().__init__(END)
        self.done = run.done
        speculative = parse_speculative(run.config.speculation.speculative_config)
        # Without ids there is nothing to compare, and rules that are not seed-stable may refuse a draft that then comes true.
        self.walks = run.header["level"] == "tokens" and (speculative is None or verify.get(speculative.rule).seed_stable)
        self.stops: dict[int, int] = {}

    def open(self, slot: int, req: Request) -> None:
        """Remember what the request said, and where END is to be said instead."""
        super().open(slot, req)
        if slot in self.replies:
            begin, reply = self.replies[slot]
            self.stops[slot] = begin + len(reply) - 1 if len(reply) and reply[-1] == END else -1
            self.replies[slot] = begin, req.extras["truth"][req.branch]

    def close(self, slot: int) -> None:
        """Forget the slot."""
        super().close(slot)
        self.stops.pop(slot, None)

    def judge(self, plan: StepPlan) -> Verdict:
        """The truth, with END where the reply ended."""
        v = super().judge(plan)
        for s, slot in enumerate(plan.slot.tolist()):
            at = self.stops.get(slot, -1) - int(plan.start[s] + plan.count[s])
            if 0 <= at < v.off[s + 1] - v.off[s]:
                v.ids[v.off[s] + at] = END
        return v

    def _judge_drafts(self, plan: StepPlan, off: Ints) -> Verdict:
        if self.walks:
            return super()._judge_drafts(plan, off)
        done, at = self.done[plan.id], plan.start + plan.count
        counts = np.where(plan.want & int(Want.SAMPLE), np.diff(done.path_off) + 1, 0)
        ids = [self.ids(slot, a, a + n) for slot, a, n in zip(plan.slot.tolist(), at.tolist(), counts.tolist())]
        off[0], off[1:] = 0, np.cumsum(counts)
        return Verdict(done.path_off, done.path, off, np.concatenate(ids))


@dataclass(slots=True)
class TurnDriver(VirtualDriver):
    """Turns when the engine had them, with what it found in its inbox before a step's end. A turn of another time is none."""

    inputs: dict[float, list[Event]] = field(default_factory=dict)

    def _deliver(self, index: int, events: list[Any]) -> None:
        if (found := self.inputs.pop(self.now, None)) is not None:
            VirtualDriver._deliver(self, index, [*found, *events])


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
    answers, names = RecordedAnswers(run.answers), None
    parts: dict[str, Any] = {"log": lambda: check, "speculation": lambda: recorded_parts(run.config, answers)}
    if run.header["level"] == "shape":
        names = RecordedNames()
        names.names = list(run.names)
        parts["content"] = lambda: names
    replica = make_replica(
        run.config, run.target(NoLatency()), Collector(timeline=False), oracle=lambda: RecordedOracle(run), parts=parts,
        max_drafts=loop_config(run.config, 0).max_drafts, executor=lambda *made: TimedExecutor(run, *made),
    )  # fmt: skip
    loop = replica.loop
    others = block_managers(run.config, geometries(run.header)[1:], run.header["max_model_len"])
    loop.lanes, answers.cache = (loop.kv, *others), loop.kv
    driver = TurnDriver([replica], (), bursts=False, inputs={at: [] for at in run.turns})
    ends = set(run.ends.values())
    for at in run.turns:
        if at not in ends:
            driver.post(at, 0, Tick())
    for at, event, after in run.events:
        if after:
            driver.post(at, 0, event)
        else:
            driver.inputs[at].append(event)
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
