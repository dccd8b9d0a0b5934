"""A request's life, read from a decision log: what it waited for, the steps it ran in, what was drafted for it and what became of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage.core.types import EMPTY, Finish, Ints, Wait, Why

Owner = tuple[str, int]
"""(request id, branch)."""
NOBODY: Owner = ("", -1)

WORDS = {
    Why.BUDGET: "the step's token budget was used up (max_num_batched_tokens)",
    Why.NO_BLOCKS: "too few KV blocks were free",
    Why.MAX_SEQS: "all seats were taken (max_num_seqs)",
    Why.WAITING: "it was not ready to run",
    Why.CHUNKED: "its prompt is computed in chunks",
    Why.POLICY_FAILED: "the scheduling policy failed",
    Why.STALLED: "the scheduling policy could not make progress",
}


@dataclass(slots=True)
class Ran:
    """One step of one branch. ``now``: launch; ``seconds``: how long the step took, ``predicted``: what the latency model said (0: no model).

    ``start``, ``count``: first known token computed and how many; ``requests``, ``rows``: the whole step's. ``asked`` nodes by the length policy,
    ``granted`` by the scheduler; verified are ``parent``, ``prob``, ``source`` and (at level tokens) ``token`` [nodes]; ``path``: accepted ones.
    ``new``: tokens gained, ``ids``: which (at level tokens). ``fault``: why the step failed.
    """

    step: int
    now: float
    start: int
    count: int
    requests: int
    rows: int
    predicted: float
    asked: int
    granted: int
    token: Ints
    parent: Ints
    prob: np.ndarray
    source: np.ndarray
    seconds: float = 0.0
    path: list[int] = field(default_factory=list)
    new: int = 0
    ids: list[int] = field(default_factory=list)
    fault: str = ""


@dataclass(slots=True)
class Delay:
    """A time in which a branch did not run: ``cause`` is "queue", a wait bit's name, or "preempted"; ``reasons``: in how many steps what."""

    cause: str
    since: float
    until: float | None = None
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Branch:
    """One branch of a request. ``finish`` is "" while it runs; ``life``: prompt, output, preemptions, arrival, first run, first token."""

    ran: list[Ran] = field(default_factory=list)
    delays: list[Delay] = field(default_factory=list)
    finish: str = ""
    ended: float = 0.0
    life: list[float] = field(default_factory=list)

    @property
    def waiting(self) -> Delay | None:
        """The delay that has not ended."""
        return self.delays[-1] if self.delays and self.delays[-1].until is None else None


@dataclass(slots=True)
class History:
    """What a log says about a request. ``request``: its arrival record, empty if that was rotated away; ``notes``: the log's own."""

    id: str
    header: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    arrival: float = 0.0
    branches: dict[int, Branch] = field(default_factory=dict)
    notes: list[list[str]] = field(default_factory=list)


@dataclass(slots=True)
class _Decision:
    """A decision with slots replaced by whose they were."""

    step: int
    rows: np.ndarray
    owners: list[Owner]
    evicted: list[Owner]
    why: list[tuple[Owner, int, float]]
    predicted: float


def history(frames: Iterable[tuple[str, Any]], request_id: str) -> History:
    """The history of one request; without branches if the log has nothing of it."""
    reader = _Reader(request_id)
    for tag, body in frames:
        reader.take(tag, body)
    return reader.history


def requests(frames: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """Request id -> [prompt tokens, output tokens of all branches, finish reasons], in order of arrival."""
    found: dict[str, list[Any]] = {}
    for tag, body in frames:
        if tag == "i":
            for event in body[1]:
                if event[0] == "arrive":
                    prompt = event[2]["prompt"]
                    found[event[2]["id"]] = [prompt if isinstance(prompt, int) else len(prompt) // 4, 0, []]
        elif tag == "e":
            _, name, _, finish, life = body
            row = found.setdefault(name, [life[0], 0, []])
            row[1] += life[1]
            row[2].append(Finish(finish).name.lower())
    return found


class _Reader:
    """Takes frames in order. A turn's decisions are logged before its inputs, and happened after them."""

    def __init__(self, request_id: str) -> None:
        self.id, self.history = request_id, History(request_id)
        self.whose: dict[int, Owner] = {}
        self.drafts: dict[int, list[Any]] = {}
        self.made: list[_Decision] = []
        self.flights: dict[int, list[tuple[int, Ran]]] = {}

    def take(self, tag: str, body: Any) -> None:
        """One frame."""
        match tag:
            case "h":
                self.history.header = body
            case "r":
                self.whose[body[0]] = (body[1], body[2])
            case "s":
                self.drafts[body[0]] = body[1:]
            case "d":
                self.made.append(self._decision(body))
            case "e" if body[1] == self.id:
                self._ended(*body)
            case "n":
                self.history.notes.append(body)
            case "i":
                self._turn(*body)

    def _decision(self, body: list[Any]) -> _Decision:
        step, _, rows, _, evict, predicted, _, why = body
        spans = np.frombuffer(rows, np.int32).reshape(6, -1)
        evicted = [self.whose.get(s, NOBODY) for s in np.frombuffer(evict, np.int32).tolist()]
        owners = [self.whose.get(s, NOBODY) for s in spans[0].tolist()]
        return _Decision(step, spans, owners, evicted, [(self.whose.get(s, NOBODY), code, n) for s, code, n in why], predicted)

    def _branch(self, branch: int) -> Branch:
        return self.history.branches.setdefault(branch, Branch())

    # ---- inputs

    def _turn(self, now: float, events: list[Any], names: Any, cuts: list[Any]) -> None:
        done = [e for e in events if e[0] == "done" and e[1] in self.flights]
        # Of a log whose beginning is gone the first results belong to steps that are not in it.
        for event, cut in zip(done, cuts[len(cuts) - len(done) :]):
            self._settle(event, cut)
        for event in events:
            self._event(now, event)
        for decision in self.made:
            self._launch(now, decision)
        self.made = []

    def _event(self, now: float, event: list[Any]) -> None:
        match event:
            case ["arrive", wait, request] if request["id"] == self.id:
                self.history.request, self.history.arrival = request, request["arrival"]
                cause = (Wait(wait).name or "several things").lower() if wait else "queue"
                self._branch(0).delays.append(Delay(cause, request["arrival"]))
            case ["waited", name, *_] if name == self.id and (delay := self._branch(0).waiting) is not None:
                delay.until = now
                self._branch(0).delays.append(Delay("queue", now))
            case ["fault", step, error, *_]:
                for _, ran in self.flights.pop(step, []):
                    ran.fault = error

    def _settle(self, event: list[Any], cut: list[Any]) -> None:
        _, step, t0, t1, path_off, path = event
        ends, nodes = np.frombuffer(path_off, np.int32), np.frombuffer(path, np.int32)
        off, ids = np.frombuffer(cut[0], np.int32), np.frombuffer(cut[2], np.int32)
        for i, ran in self.flights.pop(step):
            ran.seconds, ran.new = t1 - t0, int(off[i + 1] - off[i])
            # A stop may cut a step short: only what was kept counts as accepted.
            ran.path = nodes[ends[i] : ends[i + 1]].tolist()[: ran.new]
            ran.ids = ids[off[i] : off[i + 1]].tolist()

    def _ended(self, now: float, name: str, branch: int, finish: int, life: list[float]) -> None:
        b = self._branch(branch)
        b.finish, b.ended, b.life = Finish(finish).name.lower(), now, life
        if (delay := b.waiting) is not None:
            delay.until = now

    # ---- decisions

    def _launch(self, now: float, d: _Decision) -> None:
        draft, mine = self.drafts.pop(d.step, None), list[tuple[int, Ran]]()
        for i, (name, branch) in enumerate(d.owners):
            if name != self.id:
                continue
            b = self._branch(branch)
            if (delay := b.waiting) is not None:
                delay.until = now
            asked, granted, nodes = _drafted(draft, i)
            start, count = d.rows[1:3, i].tolist()
            rows = int(d.rows[2:4].sum())
            mine.append((i, Ran(d.step, now, start, count, len(d.owners), rows, d.predicted, asked, granted, *nodes)))
            b.ran.append(mine[-1][1])
        self.flights[d.step] = mine
        for owner, code, number in d.why:
            if code == Why.EVICTED and owner in d.evicted and owner[0] == self.id:
                gave = Counter({f"KV blocks ran out; {int(number)} computed tokens were given up": 1})
                self._branch(owner[1]).delays.append(Delay("preempted", now, None, gave))
        for branch, b in self.history.branches.items():
            if (delay := b.waiting) is not None and delay.cause in ("queue", "preempted") and delay.since < now:
                delay.reasons[self._reason(d, branch)] += 1

    def _reason(self, d: _Decision, branch: int) -> str:
        """Why a waiting branch is not in this step: its own reason, or that of the one before it in the queue."""
        for owner, code, _ in d.why:
            if code != Why.EVICTED:
                text = WORDS.get(Why(code), Why(code).name.lower())
                return text if owner == (self.id, branch) else f"behind {owner[0]}: {text}"
        return "others were preempted, and then nobody is admitted" if d.evicted else "the step was planned before it came"


def _drafted(draft: list[Any] | None, i: int) -> tuple[int, int, tuple[Ints, Ints, np.ndarray, np.ndarray]]:
    """asked, granted and (token, parent, prob, source) of span ``i``; nothing in an engine without drafter."""
    if draft is None:
        return 0, 0, (EMPTY, EMPTY, np.empty(0, np.float32), np.empty(0, np.uint8))
    kinds = ("i4", "i4", "i4", "i4", "i4", "f4", "u1")
    asked, granted, offset, token, parent, prob, source = (np.frombuffer(part, kind) for part, kind in zip(draft, kinds, strict=True))
    mine = slice(int(offset[i]), int(offset[i + 1]))
    return int(asked[i]), int(granted[i]), (token[mine], parent[mine], prob[mine], source[mine])
