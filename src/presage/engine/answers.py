"""What companions told the loop, as entries of the decision log, and what tells it again on replay.

What a drafter holds (texts it has seen, a model's weights) is not in the log. To the loop it is an outsider whose answers are inputs, as a step's
results are: its hints, its forward passes, the blocks it took from lane 0, and its drafts as they came out of the grammars' pruning. A
companion's refusal of a request is one more. Length policy, scheduler, cache and loop run again and are checked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from presage.core.errors import ReplayMismatch, RequestError
from presage.core.plan import Draft, Grants, Moves, StepDone, StepPlan
from presage.core.protocols import Drafter, EngineView, KVCache
from presage.core.request import Request
from presage.core.types import EMPTY, Ints

Entry = list[Any]
"""[kind, ...]: "hint", "blocks" (taken by a drafter), "pass" (one of its forward passes), "draft", "refused" (a request's id)."""


def hint_entry(hint: Ints) -> Entry:
    """Most slots have no hint, so only those that have are kept."""
    some = np.flatnonzero(hint)
    return ["hint", len(hint), some.astype(np.int32).tobytes(), hint[some].astype(np.int32).tobytes()]


def pass_entry(plan: StepPlan) -> Entry:
    """Which rows run where; which tokens they hold decides nothing."""
    spans = np.stack([plan.slot, plan.start, plan.count, plan.nodes, plan.layer0, plan.layer1]).astype(np.int32)
    return ["pass", plan.lane, spans.tobytes()]


def draft_entry(draft: Draft, tokens: bool) -> Entry:
    """All that length policies read of a draft, and the ids if ``tokens``. Depths follow from parents; rows of ``q`` are the executor's."""
    ids = draft.token if tokens else EMPTY
    columns = (draft.offset, draft.parent, draft.prob, draft.source, draft.trial_node, draft.trial_q, ids)
    return ["draft", *(column.tobytes() for column in columns)]


class WatchedCache:
    """Lane 0's block manager as drafters see it: the blocks they take are told to ``keep``, everything else passes."""

    def __init__(self, inner: KVCache, keep: Callable[[Entry], None]) -> None:
        self._inner, self._keep = inner, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply(self, slots: Ints, upto: Ints) -> Moves:
        """As the manager's own."""
        self._keep(["blocks", slots.astype(np.int32).tobytes(), np.asarray(upto, np.int32).tobytes()])
        return self._inner.apply(slots, upto)


class RecordedAnswers(Drafter):
    """Answers as recorded: stands in for the drafter, and refuses the requests that some companion refused.

    ``cache``: lane 0's block manager, from which it takes the blocks that the drafter took. Raises ReplayMismatch where the loop asks for
    something else than it asked for when it was recorded.
    """

    def __init__(self, entries: Iterable[Entry] = (), cache: KVCache | None = None) -> None:
        self.cache = cache
        self.refused: set[str] = set()
        self.left: deque[Entry] = deque()
        self.feed(entries)

    def feed(self, entries: Iterable[Entry]) -> None:
        """More of the log."""
        for entry in entries:
            if entry[0] == "refused":
                self.refused.add(entry[1])
            else:
                self.left.append(entry)

    def open(self, slot: int, req: Request) -> None:
        """Refuses who was refused."""
        if req.id in self.refused:
            raise RequestError("a companion refused this request when it was recorded")

    def hint(self, view: EngineView) -> Ints:
        """The next recorded hint [C]."""
        _, size, slots, values = self._next("hint")
        out = np.zeros(size, np.int32)
        out[np.frombuffer(slots, np.int32)] = np.frombuffer(values, np.int32)
        return out

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """The recorded draft, after the recorded passes."""
        while True:
            kind, *body = self._next("draft", "pass", "blocks")
            if kind == "draft":
                return _draft(body, len(grants))
            if kind == "pass":
                yield _pass(*body)
            elif self.cache is not None:
                self.cache.apply(*(_array(part, np.int32) for part in body))

    def _next(self, *kinds: str) -> Entry:
        found = self.left.popleft() if self.left else ["nothing"]
        if found[0] not in kinds:
            raise ReplayMismatch(f"the loop asks its drafter for a {kinds[0]} where the log has {found[0]}")
        return found


def _array(data: bytes, kind: Any) -> np.ndarray:
    # A copy may be written to: kernels know read-only arrays as another type, and would be compiled twice.
    return np.frombuffer(data, kind).copy()


def _pass(lane: int, spans: bytes) -> StepPlan:
    slot, start, count, nodes, layer0, layer1 = _array(spans, np.int32).reshape(6, -1)
    n = len(slot)
    rows = np.concatenate([[0], np.cumsum(count + nodes)]).astype(np.int32)
    want = np.zeros(n, np.uint8)
    return StepPlan(-1, lane, slot, start, count, nodes, layer0, layer1, want, rows, EMPTY, EMPTY, EMPTY, (), Draft.none(n))


def _draft(body: Sequence[bytes], grants: int) -> Draft:
    kinds = (np.int32, np.int32, np.float32, np.uint8, np.int32, np.int32, np.int32)
    offset, parent, prob, source, trial_node, trial_q, token = map(_array, body, kinds)
    if len(offset) != grants + 1:
        raise ReplayMismatch(f"the loop asks for {grants} drafts where the log has {len(offset) - 1}")
    ids = token if len(token) else np.zeros(len(parent), np.int32)
    return Draft(offset, ids, parent, depths(offset, parent), prob, source, trial_node, trial_q)


def depths(offset: Ints, parent: Ints) -> Ints:
    """Depth [N] of every node from 1, level by level. ``parent`` [N] counts within its grant (``offset`` [G+1]), -1 = the last known token."""
    above = parent + np.repeat(offset[:-1], np.diff(offset))
    depth = np.ones(len(parent), np.int32)
    deeper = np.flatnonzero(parent >= 0)
    while len(deeper):
        deeper = deeper[depth[deeper] <= depth[above[deeper]]]
        depth[deeper] = depth[above[deeper]] + 1
    return depth
