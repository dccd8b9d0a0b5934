"""Stop strings in the engine loop: how many of a step's new ids to keep. Only requests that have stop strings cost anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from presage.core.request import Request
from presage.tokenize.detokenize import Detokenizer
from presage.tokenize.stops import StopAutomaton
from presage.tokenize.tokenizer import Tokenizer


class _Slot:
    """One request: its detokeniser, its state in the automaton, and both after every id, so that a rewind is an index."""

    def __init__(self, text: Detokenizer, automaton: StopAutomaton, n_prompt: int, min_tokens: int) -> None:
        self.text, self.automaton, self.n_prompt, self.min_tokens = text, automaton, n_prompt, min_tokens
        self.past: list[tuple[tuple[Any, ...], int]] = [(text.save(), 0)]

    def take(self, token_id: int) -> str | None:
        armed = len(self.past) > self.min_tokens
        state, _, stop = self.automaton.feed(self.past[-1][1], self.text.push([token_id]), armed)
        self.past.append((self.text.save(), state))
        return stop

    def rewind(self, n_output: int) -> None:
        del self.past[max(n_output, 0) + 1 :]
        self.text.restore(self.past[-1][0])

    def copy(self, text: Detokenizer) -> _Slot:
        twin = _Slot(text, self.automaton, self.n_prompt, self.min_tokens)
        twin.past = list(self.past)
        twin.text.restore(twin.past[-1][0])
        return twin


class StopStrings:
    """Companion of the loop, by slot. The front cuts the text; this only says where the ids end.

    Slots that were not opened, or whose request has no stop strings, keep everything.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._slots: dict[int, _Slot] = {}

    def __contains__(self, slot: object) -> bool:
        return slot in self._slots

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot; ids it already emitted are read as known."""
        self._slots.pop(slot, None)
        stops = req.sampling.stop
        if not stops:
            return
        automaton = StopAutomaton([stops] if isinstance(stops, str) else stops)
        self._slots[slot] = held = _Slot(self._detokenizer(req), automaton, len(req.prompt), req.sampling.min_tokens)
        for i in req.emitted:
            held.take(int(i))

    def check(self, slot: int, ids: Sequence[int]) -> tuple[int, str | None]:
        """(how many of the new ``ids`` stay, the stop string that ended the output). The id that completes it stays."""
        held = self._slots.get(slot)
        if held is None:
            return len(ids), None
        for n, i in enumerate(ids, 1):
            stop = held.take(int(i))
            if stop is not None:
                return n, stop
        return len(ids), None

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known`` (prompt included)."""
        held = self._slots.get(slot)
        if held is not None:
            held.rewind(known - held.n_prompt)

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` starts as a copy of ``src``."""
        held = self._slots.get(src)
        self._slots.pop(dst, None)
        if held is not None:
            self._slots[dst] = held.copy(self._detokenizer(req))

    def length(self, slot: int) -> int:
        """Known ids of an opened slot with stop strings, else 0."""
        held = self._slots.get(slot)
        return held.n_prompt + len(held.past) - 1 if held else 0

    def close(self, slot: int) -> None:
        """The request left the slot."""
        self._slots.pop(slot, None)

    def _detokenizer(self, req: Request) -> Detokenizer:
        return Detokenizer(self._tokenizer, req.prompt, req.sampling.skip_special_tokens)
