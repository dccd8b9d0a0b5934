"""Replay recorded outputs against a drafter, offline: what would have been drafted and accepted, and what drafting costs.

The recorded output stands in for the model: a draft is accepted as far as it agrees with it, plus the one id that a verification step
always gives. Nothing else of the engine runs, so thousands of steps take a second. Any drafter without forward passes of its own can be
replayed, alone or under a length policy, which is told the step times of a ``Machine``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from presage.bench.machine import Machine, facts_of, view_of
from presage.bench.recordings import Recording
from presage.core.errors import ConfigError
from presage.core.plan import Draft, Grants, NewIds
from presage.core.protocols import EngineView, LengthController
from presage.core.request import Request
from presage.core.types import EMPTY, Ints
from presage.draft.prune import keep_nodes


class Replayable(Protocol):
    """What a replay needs of a drafter."""

    def open(self, slot: int, req: Request) -> None: ...
    def advance(self, new: NewIds) -> None: ...
    def close(self, slot: int) -> None: ...
    def hint(self, view: EngineView) -> Ints: ...
    def propose(self, view: EngineView, grants: Grants) -> Any: ...


@dataclass(slots=True)
class Replay:
    """Counts and seconds of a replay. ``drafted`` ids were made, ``verified`` of them after the length policy's cut.

    ``indexed``: ids of prompts and outputs that the drafter took in. ``draft_seconds``, ``append_seconds``: its CPU time for either.
    ``position`` [k]: how often the k-th id of a draft was accepted. ``seconds``, ``plain_seconds``: the machine's time with drafts, and
    for the same ids without.
    """

    name: str
    requests: int = 0
    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    indexed: int = 0
    draft_seconds: float = 0.0
    append_seconds: float = 0.0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    bytes_per_token: float = float("nan")
    position: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Ids decided, drafted and verified per step (of one request), accepted share of the verified, microseconds per drafted id, per
        step and per id taken in, bytes per id stored, and how much faster than without drafts the machine is."""
        return {
            "tokens_per_step": self.tokens / max(1, self.steps),
            "drafted_per_step": self.drafted / max(1, self.steps),
            "verified_per_step": self.verified / max(1, self.steps),
            "accepted_share": self.accepted / max(1, self.verified),
            "us_per_drafted": 1e6 * self.draft_seconds / max(1, self.drafted),
            "us_per_step": 1e6 * self.draft_seconds / max(1, self.steps),
            "us_per_appended": 1e6 * self.append_seconds / max(1, self.indexed),
            "bytes_per_token": self.bytes_per_token,
            "speedup": self.plain_seconds / max(self.seconds, 1e-9),
        }


def accepted_path(token: Sequence[int], parent: Sequence[int], truth: Sequence[int]) -> list[int]:
    """Indices of the draft nodes that agree with ``truth``, root to leaf. Nodes come parents first."""
    path: list[int] = []
    at = -1
    for i, (t, p) in enumerate(zip(token, parent, strict=True)):
        if p == at and len(path) < len(truth) and t == truth[len(path)]:
            path.append(i)
            at = i
    return path


def learn(drafter: Replayable, past: Iterable[Recording], slot: int = 0) -> None:
    """Let the drafter see requests from beginning to end."""
    for i, one in enumerate(past):
        drafter.open(slot, Request(id=f"past-{i}", prompt=one.prompt))
        drafter.advance(new_ids({slot: one.output}))
        drafter.close(slot)


def replay(
    drafter: Replayable,
    eval_set: Sequence[Recording],
    *,
    name: str = "",
    concurrency: int = 1,
    cap: int = 16,
    length: LengthController | None = None,
    machine: Machine | None = None,
) -> Replay:
    """Replay ``eval_set`` with up to ``concurrency`` requests at a time. Without a length policy every draft is verified whole.

    A request's first output id comes from its prompt pass and is not drafted. Raises ConfigError for drafters that run forward passes.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, not {concurrency}", param="concurrency")
    player = _Player(drafter, Replay(name), concurrency, cap, length, machine or Machine())
    waiting = list(reversed(eval_set))
    while waiting or player.of:
        while waiting and len(player.of) < concurrency:
            player.open(waiting.pop())
        player.step()
    player.out.draft_seconds -= getattr(drafter, "converting", 0.0)
    return player.out


def new_ids(ids: dict[int, Ints]) -> NewIds:
    """New ids by slot."""
    off = np.concatenate([[0], np.cumsum([len(x) for x in ids.values()])]).astype(np.int32)
    return NewIds(np.array(list(ids), np.int32), off, np.concatenate([EMPTY, *ids.values()]).astype(np.int32), np.zeros(len(ids), np.uint8))


class _Player:
    """Slots in lockstep: look up, accept, append; a finished request's slot takes the next one."""

    def __init__(self, drafter: Replayable, out: Replay, concurrency: int, cap: int, length: LengthController | None, machine: Machine) -> None:
        self.drafter, self.out, self.cap, self.length, self.machine = drafter, out, cap, length, machine
        self.wishes: Any = getattr(length, "wishes", None)
        self.view = view_of(concurrency)
        self.free = list(range(concurrency))
        self.of: dict[int, Recording] = {}
        self.at: dict[int, int] = {}

    def open(self, one: Recording) -> None:
        """A request and its first output id."""
        slot, table = self.free.pop(0), self.view.table
        req = Request(id=f"replay-{self.out.requests}", prompt=one.prompt)
        self.of[slot], self.at[slot] = one, 1
        table.seq[slot], table.known[slot], table.limit[slot] = self.out.requests, len(one.prompt) + 1, len(one.prompt) + len(one.output)
        if self.wishes is not None:
            self.wishes.open(slot, req)
        first, nothing = new_ids({slot: one.output[:1]}), new_ids({slot: EMPTY})
        start = time.thread_time()
        self.drafter.open(slot, req)
        self.drafter.advance(first)
        # A long prompt takes several calls to index, as it does while it is computed.
        for _ in range(len(one.prompt) // 4096):
            self.drafter.advance(nothing)
        self.out.append_seconds += time.thread_time() - start
        self.out.requests += 1
        self.out.indexed += len(one.prompt) + 1

    def step(self) -> None:
        """One verification step of all running requests."""
        slots = np.array(sorted(self.of), np.int32)
        grants = Grants.of(slots, np.ones(len(slots), np.int32), 1, draft=self._budget(slots))
        draft = self._draft(grants)
        paths = [self._judge(draft, i, int(s)) for i, s in enumerate(slots.tolist())]
        new = new_ids({s: self.of[s].output[self.at[s] : self.at[s] + len(p) + 1] for s, p in zip(slots.tolist(), paths, strict=True)})
        done = [s for s, n in zip(slots.tolist(), np.diff(new.off).tolist(), strict=True) if self.at[s] + n >= len(self.of[s].output)]
        start = time.thread_time()
        self.drafter.advance(new)
        for slot in done:
            self.drafter.close(slot)
        self.out.append_seconds += time.thread_time() - start
        self._settle(grants, draft, new, paths)
        for slot in done:
            self.free.append(slot)
            del self.of[slot], self.at[slot]
            if self.wishes is not None:
                self.wishes.close(slot)

    def _budget(self, slots: Ints) -> Ints:
        view, t = self.view, self.view.table
        view.step, view.ready, view.known, view.computed, view.running = view.step + 1, slots, t.known, t.known - 1, len(slots)
        most = np.minimum(np.maximum(t.limit[slots] - t.known[slots] - 1, 0), self.cap)
        if self.length is not None:
            most = np.minimum(most, self.length.ask(view, self.drafter.hint(view))[slots])
        return np.asarray(most, np.int32)

    def _draft(self, grants: Grants) -> Draft:
        """What is verified. As in the engine, a drafter that is asked for nothing is not called."""
        if not grants.draft.any():
            return Draft.none(len(grants))
        start = time.thread_time()
        draft = _result(self.drafter.propose(self.view, grants))
        self.out.draft_seconds += time.thread_time() - start
        self.out.drafted += len(draft)
        if self.length is None:
            return draft
        return keep_nodes(draft, self.length.select(self.view, grants, draft).node, np.ones(len(grants), bool))

    def _judge(self, draft: Draft, i: int, slot: int) -> list[int]:
        a, b = int(draft.offset[i]), int(draft.offset[i + 1])
        truth = self.of[slot].output[self.at[slot] : -1].tolist()
        return accepted_path(draft.token[a:b].tolist(), draft.parent[a:b].tolist(), truth)

    def _settle(self, grants: Grants, draft: Draft, new: NewIds, paths: list[list[int]]) -> None:
        out, n, counts = self.out, len(grants), np.diff(new.off)
        out.steps, out.tokens, out.indexed = out.steps + n, out.tokens + len(new.ids), out.indexed + len(new.ids)
        out.verified, out.accepted = out.verified + len(draft), out.accepted + sum(map(len, paths))
        out.position.extend([0] * (max(map(len, paths)) - len(out.position)))
        for k in (k for path in paths for k in range(len(path))):
            out.position[k] += 1
        begun = out.seconds
        out.seconds += self.machine.seconds(n + len(draft))
        out.plain_seconds += self.machine.seconds(n) * len(new.ids) / n
        if self.length is not None:
            self.length.observe(facts_of(self.view, grants, draft, new, paths, begun, out.seconds))
        for slot, count in zip(grants.slot.tolist(), counts.tolist(), strict=True):
            self.at[slot] += count
            self.view.table.known[slot] += count


def _result(proposing: Any) -> Draft:
    try:
        next(proposing)
    except StopIteration as stop:
        drafted: Draft = stop.value
        return drafted
    raise ConfigError("only drafters without forward passes of their own can be replayed offline", param="method")
