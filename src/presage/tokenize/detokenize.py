"""Incremental detokenisation: ids in, text out, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from presage.tokenize.tokenizer import Tokenizer

HELD_BYTES = 3
HELD_IDS = 8
BROKEN = "\ufffd"


class Detokenizer:
    """Text of one output, piece by piece. The pieces concatenate to ``decode(prompt + output)`` after ``decode(prompt)``.

    ``prompt_ids`` decide two things: whether a leading space is the text's own (after a prompt it is), and the first bytes of a character
    that the prompt left unfinished. ``save``/``restore`` make rewinding an assignment. Not thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] | np.ndarray = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window = None if tokenizer.table is not None else _Window(tokenizer, skip_special_tokens)
        self._rest = b""
        self._at_start = tokenizer.table is not None and tokenizer.table.strip
        if len(prompt_ids):
            self._after(prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete; an unfinished character at the end waits for the next call."""
        if self._window is not None:
            return self._window.push(ids)
        data = self._rest + self._tokenizer.join(ids, self._skip)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return self._stripped(text)

    def finish(self) -> str:
        """What was held back, as U+FFFD if it never became a character."""
        if self._window is not None:
            return self._window.finish()
        text, self._rest = self._rest.decode(errors="replace"), b""
        return self._stripped(text)

    def save(self) -> tuple[Any, ...]:
        """State to come back to, small and immutable."""
        return (self._rest, self._at_start) if self._window is None else self._window.save()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to a state that ``save`` gave."""
        if self._window is None:
            self._rest, self._at_start = state
        else:
            self._window.restore(state)

    def _stripped(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text[1:] if text[0] == " " else text
        return text

    def _after(self, prompt_ids: Sequence[int] | np.ndarray) -> None:
        if self._window is not None:
            self._window.push([int(i) for i in prompt_ids[-HELD_IDS:]])
            return
        special = self._tokenizer.special_ids if self._skip else frozenset[int]()
        if self._at_start and not all(int(i) in special for i in prompt_ids):
            self._at_start = False
        # An unfinished character is at most three bytes; every token before it that matters lies in the last few ids.
        tail = self._tokenizer.join([int(i) for i in prompt_ids[-HELD_IDS:]], self._skip)
        rest = tail[codecs.utf_8_decode(tail, "replace", False)[1] :]
        self._rest = rest if len(rest) <= HELD_BYTES else b""


class _Window:
    """For decoders that look at their neighbours: decode a short window with and without the new ids and take the difference."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._drop = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._ids: tuple[int, ...] = ()
        self._read = 0

    def push(self, ids: Sequence[int]) -> str:
        out = ""
        for i in ids:
            if i not in self._drop:
                out += self._one(int(i))
        return out

    def finish(self) -> str:
        return self._advance()

    def save(self) -> tuple[Any, ...]:
        return (self._ids, self._read)

    def restore(self, state: tuple[Any, ...]) -> None:
        self._ids, self._read = state

    def _one(self, i: int) -> str:
        self._ids += (i,)
        text = self._decode(self._ids)
        # Bytes that never become valid must not wait for ever.
        if text.endswith(BROKEN) and len(self._ids) - self._read < HELD_IDS:
            return ""
        return self._advance()

    def _advance(self) -> str:
        before, text = self._decode(self._ids[: self._read]), self._decode(self._ids)
        # What was emitted stays as context, so that leading-space rules hit both sides of the difference alike.
        self._ids = self._ids[self._read :] if self._read and len(self._ids) > self._read else self._ids
        self._read = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
