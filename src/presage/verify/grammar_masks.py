"""Matchers of the running requests, by slot, and the masks of a step.

Rules. The end-of-text ids are allowed exactly when the text so far is complete; while fewer than ``min_tokens`` ids are out, only if
nothing else is. ``may_stop`` is False until the text is complete: stop ids and stop strings do not cut a constrained text short (a stop
string inside a JSON string would break it). A complete text that nothing can follow ends the request (``terminated``), with
``ignore_eos`` too. A request with ``extras["thinking_end_id"]`` is unconstrained until that id is out. Preemption changes nothing here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import xgrammar as xg

from presage.core.errors import GrammarError, IllegalTransition
from presage.core.plan import Draft, Grants, NewIds, StepPlan
from presage.core.request import Request
from presage.core.types import Ints, Want
from presage.draft.prune import keep_nodes
from presage.verify.grammar_compile import GrammarCompiler


@dataclass(slots=True)
class Track:
    """One constrained request. ``began``: known ids when its text began (-1: still thinking); ``taken``: ids its matcher holds.

    ``row``: the mask of the current state if it is known; ``over``: nothing may follow.
    """

    matcher: xg.GrammarMatcher
    request: Request
    known: int
    began: int
    taken: int = 0
    over: bool = False
    row: np.ndarray | None = None

    @property
    def thinking_end(self) -> int:
        """Id after which the constraint begins; -1 if it begins at once."""
        return int(self.request.extras.get("thinking_end_id", -1))

    @property
    def floor(self) -> int:
        """Known length below which end-of-text is suppressed."""
        return len(self.request.prompt) + self.request.sampling.min_tokens


@dataclass(slots=True)
class Masker:
    """Companion with the matchers, plus what the loop asks of them: ``prune``, ``late``, ``terminated``, ``may_stop``.

    Verbs are called by the loop's thread; masks may be filled by the executor's, hence the lock.
    """

    compiler: GrammarCompiler
    tracks: dict[int, Track] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    eos: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.eos = np.zeros((self.compiler.vocab_size + 31) // 32, np.int32)
        for i in self.compiler.eos_ids:
            self.eos.view(np.uint32)[i // 32] |= np.uint32(1 << (i % 32))

    def open(self, slot: int, req: Request) -> None:
        """Start a request's matcher (its grammar was compiled while it waited). Errors: GrammarError if it cannot be compiled."""
        params = req.sampling.structured_outputs
        self.lengths[slot] = len(req.prompt)
        self.tracks.pop(slot, None)
        if params is not None:
            matcher = xg.GrammarMatcher(self.compiler.take(req.id, params))
            track = Track(matcher, req, len(req.prompt), len(req.prompt))
            track.began = -1 if track.thinking_end >= 0 else track.known
            self.tracks[slot] = track
        self._extend(slot, req.emitted)

    def advance(self, new: NewIds) -> None:
        """Committed ids of one step."""
        with self.lock:
            for i, slot in enumerate(new.slot.tolist()):
                self._extend(slot, new.ids[new.off[i] : new.off[i + 1]])

    def _extend(self, slot: int, ids: np.ndarray) -> None:
        self.lengths[slot] = self.lengths.get(slot, 0) + len(ids)
        track = self.tracks.get(slot)
        if track is None or not len(ids):
            return
        track.row = None
        for token in ids.tolist():
            track.known += 1
            if track.began < 0:
                track.began = track.known if token == track.thinking_end else -1
            elif not track.over and track.known - track.began == track.taken + 1:
                # An id the grammar refuses (a program injected it) ends the text there: `taken` stays behind for good.
                track.taken += track.matcher.accept_token(token)
        self._judge(track)

    def _judge(self, track: Track) -> None:
        """Whether anything may follow. The mask made for that is kept for the next step."""
        matcher = track.matcher
        if track.began < 0:
            track.over = False
        elif matcher.is_terminated() or track.known - track.began != track.taken:
            track.over = True
        elif matcher.is_completed():
            track.row = self._mask(track)
            track.over = not (track.row & ~self.eos).any()
        else:
            track.over = False

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``."""
        with self.lock:
            self.lengths[slot] = min(self.lengths[slot], known)
            track = self.tracks.get(slot)
            if track is None or known >= track.known:
                return
            track.known, track.row = known, None
            if track.began > known:
                track.began = -1 if track.thinking_end >= 0 else known
            keep = min(track.taken, known - track.began) if track.began >= 0 else 0
            if track.taken > keep:
                track.matcher.rollback(track.taken - keep)
            track.taken = keep
            self._judge(track)

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` continues from where ``src`` stands; with another constraint than ``src`` it starts from its own ids."""
        track = self.tracks.get(src)
        same = track is not None and track.request.sampling.structured_outputs == req.sampling.structured_outputs
        if track is None and req.sampling.structured_outputs is None:
            self.lengths[dst] = self.lengths[src]
        elif track is None or not same:
            self.open(dst, req)
        else:
            with self.lock:
                self.lengths[dst] = self.lengths[src]
                row = None if track.row is None else track.row.copy()
                # `floor` counts from the source's prompt: the fork's own prompt may include the source's output.
                self.tracks[dst] = replace(track, matcher=track.matcher.fork(), request=req, row=row)

    def save(self, slot: int) -> bytes | None:
        """Nothing: a receiver rebuilds the matcher from the ids."""
        return None

    def load(self, slot: int, blob: bytes) -> None:
        """Nothing to restore: ``save`` gives nothing."""

    def close(self, slot: int) -> None:
        """The request left the slot."""
        with self.lock:
            self.lengths.pop(slot, None)
            self.tracks.pop(slot, None)

    def length(self, slot: int) -> int:
        """Known ids of a slot."""
        return self.lengths[slot]

    def constrained(self, slot: int) -> bool:
        """True if the slot's request has a grammar (its next input id is needed on the host; it takes no part in bursts)."""
        return slot in self.tracks

    def forced(self, slot: int) -> str:
        """Text that must come next, whatever the model says; empty where it has a choice, while it thinks, and at the end."""
        with self.lock:
            track = self.tracks.get(slot)
            if track is None or track.began < 0 or track.over or track.matcher.is_terminated():
                return ""
            return str(track.matcher.find_jump_forward_string())

    def terminated(self, slot: int) -> bool:
        """True if the text is complete and nothing may follow: the loop ends the request with ``stop``."""
        track = self.tracks.get(slot)
        return track is not None and track.over

    def may_stop(self, slot: int) -> bool:
        """Whether a stop id or stop string may end the request now: while thinking, or when the text is complete."""
        track = self.tracks.get(slot)
        return track is None or track.began < 0 or track.over or track.matcher.is_completed()

    def finished(self, matcher: xg.GrammarMatcher) -> bool:
        """Whether the matcher's text is complete and no id but an end of text may follow."""
        if matcher.is_terminated() or not matcher.is_completed():
            return bool(matcher.is_terminated())
        row = np.zeros((1, len(self.eos)), np.int32)
        matcher.fill_next_token_bitmask(row, 0)
        return not (row[0] & ~self.eos).any()

    def _mask(self, track: Track, known: int = -1) -> np.ndarray:
        """Mask [ceil(V/32)] of the matcher's present state, ``known`` ids in."""
        if track.matcher.is_terminated():
            return self.eos.copy()
        row = np.zeros((1, len(self.eos)), np.int32)
        track.matcher.fill_next_token_bitmask(row, 0)
        mask: np.ndarray = row[0]
        rest = mask & ~self.eos
        if (known if known >= 0 else track.known) < track.floor and rest.any():
            return rest
        # A dead end (no id of the vocabulary continues the text) must not leave a row without any choice.
        return mask if mask.any() else self.eos.copy()

    def prune(self, draft: Draft, grants: Grants) -> Draft:
        """Drop illegal draft nodes with their subtrees, and those that nothing may follow: such an id comes as the draw of its parent's row,
        and accepting it here would append an end of text that a run without drafts does not have.

        A node whose proposal was sampled from a distribution stays: the mask makes its target probability 0, and only then is the residual
        that follows its rejection exact.
        """
        if not len(draft) or not any(s in self.tracks for s in grants.slot.tolist()):
            return draft
        keep = np.ones(len(draft), bool)
        sampled = np.zeros(len(draft), bool)
        sampled[draft.trial_node[draft.trial_q >= 0]] = True
        with self.lock:
            for g, slot in enumerate(grants.slot.tolist()):
                track, low, high = self.tracks.get(slot), int(draft.offset[g]), int(draft.offset[g + 1])
                if track is not None and high > low:
                    legal, reached = Walk(self, track, draft.token[low:high], draft.parent[low:high]).legal()
                    keep[low:high] = legal | (sampled[low:high] & reached)
        return draft if keep.all() else keep_nodes(draft, keep, np.ones(len(grants), bool))

    def late(self, plan: StepPlan) -> Late | None:
        """Masks of a step, made later; None if no span of it is constrained. Errors: IllegalTransition if a matcher is not current."""
        jobs: list[Job] = []
        for s in np.flatnonzero(plan.want & int(Want.SAMPLE)).tolist():
            track = self.tracks.get(int(plan.slot[s]))
            if track is None:
                continue
            if track.known != int(plan.start[s] + plan.count[s]):
                raise IllegalTransition(f"slot {plan.slot[s]}: matcher at {track.known}, step at {plan.start[s] + plan.count[s]}")
            # A shared empty draft need not have an offset per span.
            low, high = (int(plan.draft.offset[s]), int(plan.draft.offset[s + 1])) if len(plan.draft) else (0, 0)
            jobs.append(Job(s, track, plan.draft.token[low:high], plan.draft.parent[low:high]))
        return Late(self, jobs) if jobs else None


@dataclass(slots=True)
class Job:
    """One constrained span: its draft nodes as (token, parent) [n]."""

    span: int
    track: Track
    token: Ints
    parent: Ints


@dataclass(slots=True)
class Late:
    """The masks of one step: ``fill`` in the loop's thread while the step runs, ``masks`` in the executor's before it judges."""

    masker: Masker
    jobs: list[Job]
    done: tuple[Ints, np.ndarray] | None = None
    last: set[tuple[int, int]] = field(default_factory=set)

    def fill(self) -> None:
        """Make the masks; a second call does nothing."""
        with self.masker.lock:
            if self.done is not None:
                return
            pairs: list[tuple[int, int]] = []
            rows: list[np.ndarray] = []
            for job in self.jobs:
                walk = Walk(self.masker, job.track, job.token, job.parent)
                for node, row in walk.masks():
                    pairs.append((job.span, node))
                    rows.append(row)
                self.last.update((job.span, node) for node in walk.last)
            bits = np.stack(rows) if rows else np.zeros((0, len(self.masker.eos)), np.int32)
            self.done = np.array(pairs, np.int32).reshape(-1, 2), bits

    def masks(self) -> tuple[Ints, np.ndarray]:
        """(pairs int32 [k, 2] of (span, node or -1 for the last known row), bits int32 [k, ceil(V/32)], bit 1 = allowed).

        Rows without a pair are unconstrained: nodes while thinking, and nodes below an illegal one, which no accepted path reaches.
        """
        self.fill()
        if self.done is None:
            raise GrammarError("masks were not filled")
        return self.done


    def ends(self, span: int, node: int) -> bool:
        """Whether the text is complete after a draft node, and nothing may follow."""
        self.fill()
        return (span, node) in self.last


@dataclass(slots=True)
class Walk:
    """Depth-first over a draft tree with one matcher: accept on the way down, roll back on the way up.

    ``last``: nodes met by ``masks`` after which the text is complete and nothing may follow.
    """

    masker: Masker
    track: Track
    token: Ints
    parent: Ints
    last: list[int] = field(default_factory=list)

    def legal(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [n] twice: nodes whose whole path is legal and may be continued, and nodes whose parent's path is legal."""
        ok, reached = np.zeros(len(self.token), bool), np.zeros(len(self.token), bool)
        self._visit(lambda node, fine: _mark(ok, reached, node, fine and not self._last()))
        return ok, reached

    def masks(self) -> list[tuple[int, np.ndarray]]:
        """(node, mask) of every constrained row, the last known row (-1) first."""
        track, out = self.track, []
        if track.over or track.row is not None:
            out.append((-1, self.masker.eos.copy() if track.over or track.row is None else track.row))
        elif track.began >= 0:
            out.append((-1, self.masker._mask(track)))
        if not track.over and len(self.token):
            self._visit(lambda node, fine: self._row(out, node, fine))
        return out

    def _row(self, out: list[tuple[int, np.ndarray]], node: int, fine: bool) -> None:
        if not fine or self.track.began < 0:
            return
        if self._last():
            self.last.append(node)
        out.append((node, self.masker._mask(self.track, self.track.known + self._depth(node))))

    def _last(self) -> bool:
        """Whether the text is complete where the matcher stands, and nothing may follow."""
        track = self.track
        return track.began >= 0 and self.masker.finished(track.matcher)

    def _depth(self, node: int) -> int:
        depth = 0
        while node >= 0:
            node, depth = int(self.parent[node]), depth + 1
        return depth

    def _visit(self, see: Callable[[int, bool], None]) -> None:
        """Call ``see(node, legal)`` with the matcher standing after the node; children of illegal nodes are not visited."""
        track = self.track
        if track.over:
            return
        children: dict[int, list[int]] = {}
        for node, up in enumerate(self.parent.tolist()):
            children.setdefault(up, []).append(node)
        stack: list[tuple[int, int]] = [(c, 0) for c in reversed(children.get(-1, []))]
        began = track.began
        while stack:
            node, step = stack.pop()
            if step:
                self._leave(step, began)
                continue
            fine, step = self._enter(int(self.token[node]))
            see(node, fine)
            if step:
                stack.append((node, step))
            if fine:
                stack.extend((c, 0) for c in reversed(children.get(node, [])))

    def _enter(self, token: int) -> tuple[bool, int]:
        """Take one id: (legal, what to undo: 0 nothing, 1 an accepted id, 2 the end of thinking)."""
        track = self.track
        if track.began < 0:
            if token == track.thinking_end:
                track.began = track.known
                return True, 2
            return True, 0
        fine = not track.matcher.is_terminated() and track.matcher.accept_token(token)
        return fine, int(fine)

    def _leave(self, step: int, began: int) -> None:
        if step == 1:
            self.track.matcher.rollback(1)
        else:
            self.track.began = began


def _mark(ok: np.ndarray, reached: np.ndarray, node: int, fine: bool) -> None:
    ok[node], reached[node] = fine, True
