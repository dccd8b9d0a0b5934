"""SuffixDecoding (Oliaro et al., 2024): continue what followed the longest matches in the request's own text and in other responses.

``suffix_tree`` counts, ``suffix_draft`` drafts, ``suffix_library`` remembers responses, ``suffix_store`` keeps them on disk. This is the
drafter: one own tree per slot over prompt and response, one shared tree of responses per (model, adapter, tenant, salt).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from presage.core.errors import ConfigError, RequestError
from presage.core.plan import Draft, NewIds
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Ints, Longs, Singles
from presage.draft import suffix_store
from presage.draft import suffix_tree as k
from presage.draft.host import HostDrafter
from presage.draft.sources import sources
from presage.draft.suffix_draft import (
    CURSOR,
    FRONTIER,
    GCURSOR,
    GOWNER,
    GROOT,
    KNOBS,
    REACH,
    REALS,
    ROOT,
    ROWS,
    SEAT,
    SEEN,
    STORED,
    WIDTH,
    advance_many,
    index_many,
    judge_many,
    speculate_many,
)
from presage.draft.suffix_forest import Forest
from presage.draft.suffix_library import Key, Library

_KNOBS = ("suffix_decoding_max_spec_factor", "suffix_decoding_max_spec_offset", "suffix_decoding_min_token_prob", "suffix_decoding_tree")


class SuffixDrafter(HostDrafter):
    """Drafts by suffix matching; one call for the whole batch. Settings have vLLM's names and defaults where it has them.

    ``num_speculative_tokens``: cap of a draft. ``..._max_spec_factor`` a and ``..._offset`` b: a match of m ids drafts up to a m + b.
    ``..._min_token_prob``: no node below it. ``..._tree``: trees instead of chains. ``..._max_tree_depth``: match and draft together.
    ``..._max_cached_requests`` / ``..._tokens``: what other responses are remembered (-1: all, 0 requests: none), ``..._eviction``: "fifo"
    or "lru". ``..._warm_up``: a JSONL of past outputs to begin with. ``..._store``: a file they are kept in from run to run, read now if it
    is there and written by ``shut``. A request may override factor, offset, probability and tree in its ``draft``; with 0 for
    ``..._max_cached_requests`` there it is neither remembered nor drafted from what is. Raises ConfigError for values out of range and a
    store that cannot be written, CheckpointError for files that cannot be read or are about another model.

    The engine's: ``tokenizer`` (for past outputs that are text), ``vocab_size`` (0: unknown; what is learnt from files is checked against
    it), ``model_name`` (what requests call the model that has no adapter), ``fingerprint`` (which model it is; tools without one leave the
    store alone).
    """

    source = "suffix"

    def __init__(
        self,
        num_speculative_tokens: int = 16,
        suffix_decoding_max_tree_depth: int = 24,
        suffix_decoding_max_cached_requests: int = 10000,
        suffix_decoding_max_cached_tokens: int = -1,
        suffix_decoding_eviction: str = "fifo",
        suffix_decoding_max_spec_factor: float = 1.0,
        suffix_decoding_max_spec_offset: float = 0.0,
        suffix_decoding_min_token_prob: float = 0.1,
        suffix_decoding_tree: bool = False,
        suffix_decoding_warm_up: str = "",
        suffix_decoding_store: str = "",
        tokenizer: Any = None,
        vocab_size: int = 0,
        model_name: str = "",
        fingerprint: str = "",
    ) -> None:
        super().__init__(num_speculative_tokens)
        if num_speculative_tokens > WIDTH:
            raise ConfigError(f"num_speculative_tokens must be at most {WIDTH}, not {num_speculative_tokens}", param="num_speculative_tokens")
        self.forest = Forest(suffix_decoding_max_tree_depth)
        self.library = Library(
            self.forest, suffix_decoding_max_cached_requests, suffix_decoding_max_cached_tokens, suffix_decoding_eviction
        )  # fmt: skip
        self.defaults = dict(
            zip(_KNOBS, (suffix_decoding_max_spec_factor, suffix_decoding_max_spec_offset, suffix_decoding_min_token_prob, suffix_decoding_tree))
        )
        self._knobs_of({})
        self.seat: Longs = np.zeros((8, SEAT), np.int64)
        self.knobs: Singles = np.zeros((8, KNOBS), np.float32)
        self.last: Ints = np.zeros((8, 3, num_speculative_tokens), np.int32)
        self.scratch = np.empty((ROWS, 2 * FRONTIER), np.int32), np.empty((REALS, 2 * FRONTIER), np.float32)
        self._keys: dict[int, Key] = {}
        # Trees and ids to be taken back; whether the tree itself goes with them.
        self._doomed: list[tuple[int, Ints, bool]] = []
        # In a list, as arrays among the attributes are columns by slot.
        self._marks = [sources(0, self.source)]
        self._crowded = 65536
        self.vocab_size, self.model_name, self.fingerprint = vocab_size, model_name, fingerprint
        self.kept_in = Path(suffix_decoding_store) if suffix_decoding_store and fingerprint else None
        if self.kept_in is not None:
            if not self.library.max_requests:
                raise ConfigError("suffix_decoding_store needs outputs to remember: max_cached_requests is 0", param="suffix_decoding_store")
            suffix_store.check_writable(self.kept_in, "suffix_decoding_store")
        if suffix_decoding_warm_up:
            self.warm_up(suffix_decoding_warm_up, None if tokenizer is None else partial(tokenizer.encode, add_special_tokens=False))
        # After the past outputs: what this server said itself is newer, and so is forgotten later.
        if self.kept_in is not None and self.kept_in.exists():
            self.restore(self.kept_in, fingerprint)

    # ---- companion

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot. Its prompt is indexed by quota, its response is remembered unless it opted out.

        Raises RequestError for settings of its own that are no numbers or out of range.
        """
        asked = req.draft or {}
        try:
            knobs = self._knobs_of(asked)
        except ConfigError as error:
            raise RequestError(error.message, param="draft") from None
        super().open(slot, req)
        self.knobs[slot] = knobs
        root, seat = self.forest.root(), self.seat[slot]
        seat[:] = 0
        seat[[ROOT, CURSOR, REACH]] = root, root, self.forest.depth
        if self.library.max_requests and self.cap[slot] and asked.get("suffix_decoding_max_cached_requests") != 0:
            key = self._namespace((req.model, req.adapter or "", req.tenant, req.salt.hex()))
            owner, groot = self.library.begin(key, slot), self.library.root(key)
            self._keys[slot] = key
            seat[[GROOT, GCURSOR, GOWNER]] = groot, groot, owner
            self._make_room(owner)

    def advance(self, new: NewIds) -> None:
        """Take in committed ids, after noting which drafts they confirm."""
        if self.library.lru:
            writers = np.empty(len(new.slot), np.int32)
            judge_many(self.last, new.slot, new.off, new.ids, writers)
            for owner in writers.tolist():
                self.library.touch(owner)
        left = self._take_in(new)
        if left < 0:
            super().advance(new)
        elif left:
            self._index(self._some[:left], self._upto[:left])
        if self._doomed or self.forest.ctl[k.STATES] > self._crowded:
            self._tidy()

    # ---- drafter

    def hint(self, view: EngineView) -> Ints:
        """Most nodes [C] each slot could get, taking its longest match when it was last looked up to have grown by the ids since.

        What other requests stored meanwhile may make a longer match; the next look-up finds it.
        """
        out = np.zeros(len(view.known), np.int32)
        m = min(len(out), len(self.cap))
        seat, knobs = self.seat[:m], self.knobs[:m]
        reach = np.minimum(seat[:, REACH] + view.known[:m] - seat[:, SEEN], self.forest.depth - 1)
        out[:m] = np.clip(np.floor(reach * knobs[:, 0] + knobs[:, 1] + 1e-6), 0, self.cap[:m])
        return out

    def draft(self, slots: Ints, budget: Ints) -> Draft:
        """At most ``budget`` [G] nodes for each of ``slots`` [G], with the estimated probability that each is accepted."""
        draft, _ = self.speculate(slots, budget)
        return draft

    def speculate(self, slots: Ints, budget: Ints) -> tuple[Draft, Singles]:
        """``draft`` and, per grant, (match length, 1 own / 2 shared tree / 0 none, sum of probabilities) as float32 [G, 3]."""
        g = len(slots)
        room = g * self.num_speculative_tokens
        if room > len(self._marks[0]):
            self._marks[0] = sources(2 * room, self.source)
        offset, info = np.empty(g + 1, np.int32), np.empty((g, 3), np.float32)
        nodes, prob = np.empty(3 * room, np.int32), np.empty(room, np.float32)
        n = speculate_many(
            *self.forest.pools, self.tokens.data, self.start, self.length, self.done, self.seat, self.knobs, self.last, slots, budget,
            *self.scratch, offset, nodes, prob, info,
        )  # fmt: skip
        return Draft(offset, nodes[:n], nodes[room : room + n], nodes[2 * room : 2 * room + n], prob[:n], self._marks[0][:n]), info

    # ---- memory

    def store(self, path: str | Path, fingerprint: str) -> int:
        """Write the complete responses to a file, but for those of ``warm_up``; returns how many. ``fingerprint`` says whose the ids are."""
        done = [(e.key, e.ids) for e in self.library.entries.values() if e.slot < 0 and e.kept]
        suffix_store.write(Path(path), done, fingerprint)
        return len(done)

    def restore(self, path: str | Path, fingerprint: str) -> int:
        """Add the responses of a file to those remembered; returns how many.

        Raises CheckpointError for a damaged or foreign file, ConfigError for ids beyond the vocabulary.
        """
        return self._learn(suffix_store.read(Path(path), fingerprint), "suffix_decoding_store")

    def warm_up(self, path: str | Path, encode: Callable[[str], list[int]] | None = None) -> int:
        """Learn from a JSONL of past outputs (``suffix_store.past_outputs``); returns how many were stored."""
        return self._learn(list(suffix_store.past_outputs(Path(path), encode)), "suffix_decoding_warm_up", kept=False)

    def shut(self) -> None:
        """The engine closes: what was said goes to the store, if there is one. Raises CheckpointError if it cannot be written."""
        if self.kept_in is not None:
            self.store(self.kept_in, self.fingerprint)

    def stats(self) -> dict[str, float]:
        """Responses and ids remembered, states and edges live, bytes per id stored in any tree (ids included)."""
        held = self._held()
        size = self.forest.nbytes() + 4 * held
        return {
            "responses": len(self.library.entries),
            "tokens": self.library.tokens,
            "states": int(self.forest.ctl[k.STATES]),
            "edges": int(self.forest.ctl[k.EDGES]),
            "bytes_per_token": size / max(1, held),
        }

    # ---- inside

    def _take_in(self, new: NewIds) -> int:
        """Indexes at once too: one kernel call a step. What remains, for want of room, the base class does."""
        if len(self._some) < len(new.slot):
            self._some, self._upto = (np.zeros(2 * len(new.slot), np.int32) for _ in range(2))
        left: int = advance_many(
            *self.forest.pools, self.tokens.data, self.start, self.room, self.length, self.prompt, self.done, self.cap, self.seat,
            new.slot, new.off, new.ids, self.quota, self._some, self._upto, self.forest.work[0],
        )  # fmt: skip
        return left

    def _index(self, slots: Ints, upto: Ints) -> None:
        while not index_many(*self.forest.pools, self.tokens.data, self.start, self.prompt, self.done, self.seat, slots, upto, self.forest.work[0]):
            self.forest.grow()

    def _forget(self, slot: int, known: int) -> None:
        seat, n = self.seat[slot], int(self.done[slot])
        if known < n:
            seat[CURSOR] = self.forest.remove(int(seat[ROOT]), self._ids(slot, n), known)
            self.done[slot] = known
        out = max(0, known - int(self.prompt[slot]))
        if seat[GCURSOR] > 0 and out < seat[STORED]:
            seat[GCURSOR] = self.forest.remove(int(seat[GROOT]), self._response(slot), out)
            seat[STORED] = out
        seat[[REACH, SEEN]] = self.forest.depth, 0

    def _drop(self, slot: int) -> None:
        seat = self.seat[slot]
        if seat[GCURSOR] > 0:
            owner, ids = int(seat[GOWNER]), self._ids(slot, int(self.length[slot]))[int(self.prompt[slot]) :].copy()
            self.forest.extend(int(seat[GROOT]), seat[GCURSOR : GCURSOR + 1], [ids[int(seat[STORED]) :]], np.array([owner], np.int32))
            self.library.finish(owner, ids)
            self._make_room(owner)
        if seat[ROOT]:
            self._doomed.append((int(seat[ROOT]), self._ids(slot, int(self.done[slot])).copy(), True))
        seat[:] = 0
        self.last[slot, 1, 0] = -2
        self._keys.pop(slot, None)

    def _ids(self, slot: int, n: int) -> Ints:
        a = int(self.start[slot])
        return self.tokens.data[a : a + n]

    def _response(self, slot: int) -> Ints:
        """The part of a running response that is in the shared tree."""
        p = int(self.prompt[slot])
        return self._ids(slot, p + int(self.seat[slot, STORED]))[p:]

    def _make_room(self, spare: int) -> None:
        while (owner := self.library.victim(spare)) >= 0:
            entry = self.library.forget(owner)
            ids = entry.ids
            if entry.slot >= 0:
                ids = self._response(entry.slot).copy()
                self.seat[entry.slot, [GCURSOR, STORED]] = 0
            self._doomed.append((self.library.root(entry.key), ids, False))

    def _tidy(self) -> None:
        """What is to be forgotten goes by quota, newest ids first; pools that hold too many unmerged states are rebuilt."""
        left = self.quota // 8 * (1 + len(self._doomed) // 8)
        while self._doomed and left > 0:
            root, ids, whole = self._doomed.pop()
            keep = max(0, len(ids) - left)
            self.forest.remove(root, ids, keep)
            left -= len(ids) - keep
            if keep:
                self._doomed.append((root, ids[:keep], whole))
            elif whole:
                self.forest.drop_root(root)
        if self.forest.ctl[k.STATES] > self._crowded and not self._doomed:
            # At worst a little under two states an id are needed; twice what is there is a sign of many that could be merged.
            if self.forest.ctl[k.STATES] > 2 * self._held():
                self._rebuild()
            self._crowded = int(1.5 * self.forest.ctl[k.STATES]) + 65536

    def _held(self) -> int:
        """Ids in all trees."""
        return self.library.tokens + int(self.done.sum() + self.seat[:, STORED].sum())

    def _rebuild(self) -> None:
        self.forest.clear()
        self.library.rebuild()
        for slot in np.flatnonzero(self.seat[:, ROOT]).tolist():
            seat, upto = self.seat[slot], self.done[slot : slot + 1].copy()
            seat[[ROOT, CURSOR]] = self.forest.root()
            if slot in self._keys:
                seat[GROOT] = self.library.root(self._keys[slot])
                seat[[GCURSOR, STORED]] = seat[GROOT] if seat[GCURSOR] else 0, 0
            self.done[slot] = 0
            self._index(np.array([slot], np.int32), upto)

    def _namespace(self, key: Key) -> Key:
        """The key with one name for the model without adapters: fronts call it differently, or not at all."""
        return ("" if key[0] == self.model_name else key[0], *key[1:])

    def _learn(self, sequences: list[tuple[Key, Ints]], setting: str, kept: bool = True) -> int:
        most = max((int(ids.max()) for _, ids in sequences if len(ids)), default=0)
        if 0 < self.vocab_size <= most:
            raise ConfigError(f"a past output has id {most}, the vocabulary has {self.vocab_size}", param=setting)
        named = [(self._namespace(key), ids) for key, ids in sequences]
        stored = self.library.add(named, kept) if self.library.max_requests else 0
        self._make_room(-1)
        return stored

    def _knobs_of(self, asked: dict[str, Any]) -> tuple[float, float, float, float]:
        try:
            factor, offset, floor, tree = (float(asked.get(name, self.defaults[name])) for name in _KNOBS)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{', '.join(_KNOBS)} must be numbers ({error})", param=_KNOBS[0]) from None
        if not (math.isfinite(factor) and factor >= 0 and math.isfinite(offset) and 0 <= floor <= 1):
            raise ConfigError(
                f"need a finite factor >= 0 ({factor}), a finite offset ({offset}) and 0 <= min_token_prob <= 1 ({floor})", param=_KNOBS[0]
            )
        return factor, offset, floor, tree
