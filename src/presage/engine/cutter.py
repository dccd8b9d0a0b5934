"""Where a step's new ids stop: eos, stop ids, the length limit, stop strings, a finished grammar. What follows a stop is never kept."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from presage.core.plan import NewIds, StepDone, StepPlan
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Finish, Flag, Ints
from presage.engine.kernels import cut_ids

_STOP = int(Finish.STOP)


class TextStops(Protocol):
    """Stop strings, checked by a companion that detokenises only the requests that have some."""

    def open(self, slot: int, req: Request) -> None: ...
    def check(self, slot: int, ids: list[int]) -> tuple[int, str | None]: ...
    def fork(self, src: int, dst: int, req: Request) -> None: ...
    def rewind(self, slot: int, known: int) -> None: ...
    def close(self, slot: int) -> None: ...


class Cutter:
    """Cuts ``StepDone.new`` to what the request keeps. Replaced by recorded facts when a log without ids is replayed."""

    def __init__(self, table: Table, requests: dict[int, Request], eos: list[int], strings: TextStops | None = None) -> None:
        self.table, self.requests, self.strings = table, requests, strings
        self.eos = np.array(sorted(eos), np.int32)
        self.min_tokens = np.zeros(table.capacity, np.int32)
        self.stop_ids: dict[int, frozenset[int]] = {}

    def open(self, slot: int, req: Request) -> int:
        """Note the request's stops; returns its Flag bits."""
        if slot >= len(self.min_tokens):
            self.min_tokens = np.concatenate([self.min_tokens, np.zeros(max(slot + 1, len(self.min_tokens)), np.int32)])
        p = req.sampling
        self.min_tokens[slot] = p.min_tokens
        self.stop_ids[slot] = frozenset(p.stop_token_ids or ())
        flags = Flag.IGNORE_EOS if p.ignore_eos else Flag.NONE
        if p.structured_outputs is not None:
            flags |= Flag.GRAMMAR  # the grammar alone ends it: a stop string inside a JSON string would break the document
        else:
            flags |= Flag.STOP_IDS if self.stop_ids[slot] else Flag.NONE
            flags |= Flag.STOP_STRINGS if p.stop and self.strings is not None else Flag.NONE
            if p.stop and self.strings is not None:
                self.strings.open(slot, req)
        return int(flags | (Flag.PROMPT_LOGPROBS if p.prompt_logprobs is not None else Flag.NONE))

    def close(self, slot: int) -> None:
        """Forget a slot."""
        self.stop_ids.pop(slot, None)
        if self.strings is not None:
            self.strings.close(slot)

    def fork(self, src: int, dst: int, req: Request, known: int) -> None:
        """``dst`` (just opened) continues where ``src`` stood when it had ``known`` ids."""
        if self.strings is not None and self.table.flags[src] & int(Flag.STOP_STRINGS):
            self.strings.fork(src, dst, req)
            self.strings.rewind(dst, known)

    def cut(self, plan: StepPlan, done: StepDone, live: np.ndarray) -> NewIds:
        """The ids each span keeps, with Finish codes and what stopped it."""
        t, slot = self.table, plan.slot
        off, finish = np.empty(len(slot) + 1, np.int32), np.empty(len(slot), np.uint8)
        special = cut_ids(slot, done.new_off, done.new, live, self.eos, t.flags, t.known, t.prompt, self.min_tokens, t.end, off, finish)
        stop: dict[int, int | str] = {}
        if finish.any():
            for s in np.flatnonzero(finish == _STOP).tolist():
                stop[s] = int(done.new[done.new_off[s] + off[s + 1] - off[s] - 1])
        if special:
            off = self._cut_special(slot, done, off, finish, stop)
        if int(off[-1]) == len(done.new):
            return NewIds(slot, off, done.new, finish, stop)
        keep = np.diff(off).tolist()
        parts = [done.new[a : a + k] for a, k in zip(done.new_off[:-1].tolist(), keep)]
        return NewIds(slot, off, np.concatenate(parts), finish, stop)

    def _cut_special(self, slot: Ints, done: StepDone, off: Ints, finish: np.ndarray, stop: dict[int, int | str]) -> Ints:
        keep = np.diff(off)
        for s in np.flatnonzero((self.table.flags[slot] & int(Flag.STOP_IDS | Flag.STOP_STRINGS)) * (keep > 0)).tolist():
            self._cut_one(s, int(slot[s]), done, keep, finish, stop)
        return np.concatenate([[0], np.cumsum(keep)]).astype(np.int32)

    def _cut_one(self, s: int, slot: int, done: StepDone, keep: Ints, finish: np.ndarray, stop: dict[int, int | str]) -> None:
        first = int(done.new_off[s])
        ids = done.new[first : first + int(keep[s])].tolist()
        floor = int(self.min_tokens[slot]) - int(self.table.out[slot])
        for j, token in enumerate(ids):
            if j + 1 >= floor and token in self.stop_ids[slot]:
                ids = ids[: j + 1]
                keep[s], finish[s], stop[s] = j + 1, Finish.STOP, token
                break
        if self.table.flags[slot] & int(Flag.STOP_STRINGS) and self.strings is not None:
            kept, text = self.strings.check(slot, ids)
            if text is not None:
                keep[s], finish[s], stop[s] = kept, Finish.STOP, text
