"""The decision log: what came in and what was decided, as length-prefixed msgpack frames that replay to byte-equal decisions.

Frames: ``h`` header, ``c`` what companions answered in a turn (``answers``), ``i`` its inputs (now, events, block names, cuts), ``d`` one
decision (a launched step), ``r`` whose a slot is, ``s`` the drafts of a step, ``e`` the end of a request, ``n`` a note. Replays read h, c, i, d and
n; ``presage explain`` reads all but c.
Level ``shape`` keeps lengths, counts and block hashes; ``tokens`` keeps ids too (user data). Files rotate within a byte budget; a disk
that is full drops and counts records and marks the log unreplayable, and serving goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import numpy as np

from presage.core.events import Abort, Annotate, Arrive, Prioritise, Waited
from presage.core.plan import Draft, Facts, Grants, StepDone, StepFault, StepPlan, Wake
from presage.core.request import Request
from presage.core.types import EMPTY, Finish, Flag, Ints
from presage.engine.answers import Entry, WatchedCache, draft_entry, hint_entry, pass_entry

if TYPE_CHECKING:
    from presage.engine.loop import Loop

VERSION = 2
READABLE = (1, 2)
"""Versions that replay. Version 1 had no answers of companions: logs of engines that speculated say by a note that they do not replay."""
_FILES = 8
_log = logging.getLogger("presage.log")
_pack = msgspec.msgpack.Encoder().encode


class NullLog:
    """Level none: keeps nothing."""

    level = "none"

    def open(self, now: float, events: Sequence[Any]) -> None:
        """A turn begins."""

    def close(self, loop: Loop, wake: Wake) -> Wake:
        """A turn ends."""
        return wake

    def decided(self, loop: Loop, plan: StepPlan, grants: Grants) -> None:
        """A step was launched."""

    def settled(self, loop: Loop, facts: Facts) -> None:
        """A step's ids were cut."""

    def ended(self, loop: Loop, slot: int, finish: Finish) -> None:
        """A request ended."""

    def note(self, kind: str, text: str) -> None:
        """Something an operator should be able to find."""

    def name(self, digest: bytes) -> bytes:
        """A block got this name."""
        return digest

    def hinted(self, hint: Ints) -> Ints:
        """The drafter gave this hint [C]."""
        return hint

    def passed(self, plan: StepPlan) -> None:
        """The drafter asked for this forward pass."""

    def proposed(self, draft: Draft) -> Draft:
        """The drafter proposed this, and the grammars left it."""
        return draft

    def caches(self, kv: Sequence[Any]) -> Sequence[Any]:
        """The lanes' block managers as drafters are to see them."""
        return kv

    def flush(self) -> None:
        """Write what is buffered."""

    def shut(self) -> None:
        """Close files."""


class DecisionLog(NullLog):
    """Writes frames to ``folder/NNNNN.plog``. ``dropped`` counts records lost to a full disk."""

    def __init__(self, folder: str | Path, level: str = "shape", max_bytes: int = 256 << 20, header: dict[str, Any] | None = None) -> None:
        self.folder, self.level, self.max_bytes = Path(folder), level, max_bytes
        self.header = {"version": VERSION, "level": level, **(header or {})}
        self.dropped, self.replayable, self.turns = 0, True, 0
        self.buffer = bytearray()
        self.file: BinaryIO | None = None
        self.size = self.number = 0
        self._turn: list[Any] = []
        self._names: list[bytes] = []
        self._cuts: list[Any] = []
        self._answers: list[Entry] = []
        self._arrived: list[str] = []
        self._whose: dict[int, int] = {}
        self._frame("h", self.header)

    def open(self, now: float, events: Sequence[Any]) -> None:
        """Remember the turn's inputs; events without facts of their own (Tick) are kept by name."""
        self._turn = [now, [encode_event(e, self.level) for e in events]]
        if self.level == "shape" and any(isinstance(e, Arrive) and e.request.sampling.thinking_budget is not None for e in events):
            # That program looks at ids, and this level keeps none.
            self.replayable = False
            self.note("unreplayable", "a thinking budget needs level tokens")
        self._names, self._cuts, self._answers = [], [], []
        self._arrived = [e.request.id for e in events if isinstance(e, Arrive)]

    def close(self, loop: Loop, wake: Wake) -> Wake:
        """Write the turn. It goes to disk when enough gathered, and when the engine has nothing left to compute."""
        self.turns += 1
        # Who came and neither ended nor is there was refused, perhaps by a companion that no replay has.
        if answers := [["refused", name] for name in self._arrived if name not in loop.receiver.by_id] + self._answers:
            self._frame("c", answers)
        self._frame("i", [*self._turn, self._names, self._cuts])
        if len(self.buffer) > 1 << 16 or not wake.steps:
            self.flush()
        return wake

    def decided(self, loop: Loop, plan: StepPlan, grants: Grants) -> None:
        """The decision record: grants and evictions in plan order, prediction, free blocks, reasons; and what was drafted for it."""
        self._introduce(loop, plan, grants)
        if loop.drafter is not None:
            self._frame("s", drafted(loop, plan, grants, self.level))
        self._frame("d", decision(loop, plan, grants))

    def settled(self, loop: Loop, facts: Facts) -> None:
        """How many ids each span kept and why it ended (at level tokens also the ids)."""
        new = facts.new
        ids = new.ids.tobytes() if self.level == "tokens" else b""
        self._cuts.append([new.off.tobytes(), new.finish.tobytes(), ids])

    def ended(self, loop: Loop, slot: int, finish: Finish) -> None:
        """Which request ended how, for ``presage explain``."""
        t, req = loop.table, loop.requests[slot]
        self._arrived = [name for name in self._arrived if name != req.id]
        life = [
            int(t.prompt[slot]),
            int(t.out[slot]),
            int(t.preempted[slot]),
            float(t.arrival[slot]),
            float(t.t_start[slot]),
            float(t.t_first[slot]),
        ]
        self._frame("e", [loop.view.now, req.id, req.branch, int(finish), life])

    def note(self, kind: str, text: str) -> None:
        """A note frame."""
        self._frame("n", [kind, text])

    def name(self, digest: bytes) -> bytes:
        """Record a block's name in this turn (level shape replays need them)."""
        self._names.append(digest)
        return digest

    def hinted(self, hint: Ints) -> Ints:
        """Record the drafter's hint."""
        self._answers.append(hint_entry(hint))
        return hint

    def passed(self, plan: StepPlan) -> None:
        """Record a pass of the drafter's."""
        self._answers.append(pass_entry(plan))

    def proposed(self, draft: Draft) -> Draft:
        """Record a draft, at level tokens with its ids."""
        self._answers.append(draft_entry(draft, self.level == "tokens"))
        return draft

    def caches(self, kv: Sequence[Any]) -> Sequence[Any]:
        """Lane 0 decides which blocks are free, so what drafters take of it is recorded; nothing depends on the other lanes' blocks."""
        return [WatchedCache(kv[0], lambda entry: self._answers.append(entry)), *kv[1:]]

    def flush(self) -> None:
        """Write the buffer, rotating; on a disk error drop it, count, and mark the log unreplayable."""
        data, self.buffer = self.buffer, bytearray()
        try:
            if self.file is None or self.size > self.max_bytes // _FILES:
                self._rotate()
            assert self.file is not None
            self.file.write(data)
            self.file.flush()
            self.size += len(data)
        except OSError as error:
            if self.replayable:
                _log.warning("decision log stopped being replayable: %s", error)
            self.dropped += 1
            self.replayable = False

    def shut(self) -> None:
        """Flush and close; a second call does nothing."""
        if self.buffer or self.file is None:
            self.flush()
        if self.file is not None and not self.file.closed:
            self.file.close()

    def _introduce(self, loop: Loop, plan: StepPlan, grants: Grants) -> None:
        """Whose the slots of a decision are, once per occupant."""
        epoch = loop.table.epoch
        for slot in (*plan.slot.tolist(), *(w[0] for w in grants.why)):
            if self._whose.get(slot) != epoch[slot] and (req := loop.requests.get(slot)) is not None:
                self._whose[slot] = int(epoch[slot])
                self._frame("r", [slot, req.id, req.branch])

    def _frame(self, tag: str, body: Any) -> None:
        data = _pack([tag, body])
        self.buffer += len(data).to_bytes(4, "little") + data

    def _rotate(self) -> None:
        if self.file is not None:
            self.file.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.number == 0:
            for old in self.folder.glob("*.plog"):
                old.unlink()
        self.file = open(self.folder / f"{self.number:05d}.plog", "wb")  # noqa: SIM115 (lives as long as the log)
        self.number, self.size = self.number + 1, 0
        self._whose.clear()  # a file must be readable without those before it
        for old in sorted(self.folder.glob("*.plog"))[:-_FILES]:
            old.unlink()
            self.replayable = False


class NamedContent:
    """Block names that are also written to the log. Wraps the real content."""

    def __init__(self, inner: Any, log: DecisionLog) -> None:
        self.inner, self.log = inner, log

    def root(self, slot: int, req: Request, groups: Any) -> bytes:
        """The root's name, recorded."""
        return self.log.name(self.inner.root(slot, req, groups))

    def hashes(self, slot: int, index: int, parent: bytes, ids_bytes: bytes) -> bytes:
        """The block's name, recorded."""
        return self.log.name(self.inner.hashes(slot, index, parent, ids_bytes))


def decision(loop: Loop, plan: StepPlan, g: Grants) -> list[Any]:
    """One decision as plain data: what replays must reproduce byte for byte."""
    rows = np.stack([plan.slot, plan.start, plan.count, plan.nodes, plan.layer0, plan.layer1]).astype(np.int32)
    free = loop.kv.ledger().free.tolist()
    return [plan.id, plan.lane, rows.tobytes(), plan.want.tobytes(), g.evict.tobytes(), plan.predicted, free, [list(w) for w in g.why]]


def drafted(loop: Loop, plan: StepPlan, g: Grants, level: str) -> list[Any]:
    """What was drafted for a step: per span nodes asked for and granted, then the nodes that are verified. Ids at level tokens only."""
    draft, bare = plan.draft, level != "tokens"
    spans: list[np.ndarray] = [loop.table.ask[plan.slot].astype(np.int32), g.draft.astype(np.int32), draft.offset]
    nodes: list[np.ndarray] = [EMPTY if bare else draft.token, draft.parent, draft.prob, draft.source]
    return [plan.id, *(column.tobytes() for column in spans + nodes)]


def encode_event(event: Any, level: str) -> list[Any]:
    """One event as plain data at the log's level."""
    match event:
        case StepDone():
            return ["done", event.plan, event.t0, event.t1, event.path_off.tobytes(), event.path.tobytes()]
        case StepFault():
            return ["fault", event.plan, event.error, event.slots.tobytes(), event.retry]
        case Arrive():
            return ["arrive", int(event.wait), _request(event.request, level)]
        case Abort():
            return ["abort", event.id]
        case Waited():
            return ["waited", event.id, int(event.bit), event.error]
        case Annotate():
            return ["annotate", event.id, event.column, event.value]
        case Prioritise():
            return ["prioritise", event.id, event.priority]
    return [type(event).__name__.lower()]


def _request(req: Request, level: str) -> dict[str, Any]:
    p, tokens = req.sampling, level == "tokens"
    flags = Flag.STOP_STRINGS if p.stop else Flag.NONE
    flags |= Flag.GRAMMAR if p.structured_outputs is not None else Flag.NONE
    return {
        "id": req.id,
        "prompt": req.prompt.astype(np.int32).tobytes() if tokens else len(req.prompt),
        "emitted": req.emitted.astype(np.int32).tobytes() if tokens else len(req.emitted),
        "arrival": req.arrival,
        "kind": int(req.kind),
        "model": req.model,
        "tenant": req.tenant,
        "salt": req.salt,
        "adapter": req.adapter,
        "priority": req.priority,
        "due": [req.due_first, req.due_each, req.due_end],
        "program": req.program,
        "sink": req.sink,
        "n": p.n,
        "max_tokens": p.max_tokens,
        "min_tokens": p.min_tokens,
        "prompt_logprobs": p.prompt_logprobs,
        "flags": int(flags),
        "thinking": [p.thinking_budget, req.extras.get("thinking_end_id")],
        "draft": req.draft,
        "accept": req.accept,
    }
