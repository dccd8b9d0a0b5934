"""From a tokenizer's decoder to a table of bytes per id, where decoding is nothing but concatenation.

That holds for byte-level BPE and for SentencePiece-style decoders (``▁`` for space, ``<0xNN>`` for bytes, one leading space dropped),
which is nearly every decoder-only model. With the table, incremental decoding is a UTF-8 decoder and needs no window of earlier ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

META = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteTable:
    """``pieces[id]`` are the bytes of an id (empty for ids without a token); ``strip`` drops one space at the start of a text."""

    pieces: Sequence[bytes]
    strip: bool


def byte_table(decoder: Any, tokens: Sequence[str | None]) -> ByteTable | None:
    """The table for a ``tokenizers`` decoder and the tokens by id, or None if this decoder does more than concatenate."""
    if decoder is None:
        return None
    steps = _steps(json.loads(decoder.__getstate__()))
    kinds = [s["type"] for s in steps if s["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        letters = {ord(c): chr(b) for b, c in _letters().items()}
        # A character below 256 that is not one of the letters must not pass as the byte of its own number.
        letters.update({n: META for n in range(256) if n not in letters})
        return ByteTable([_level_bytes(t, letters) for t in tokens], strip=False)
    if not _is_sentencepiece(steps, kinds):
        return None
    fallback = "ByteFallback" in kinds
    return ByteTable([_piece_bytes(t, fallback) for t in tokens], strip="Strip" in kinds)


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    return list(state["decoders"]) if state.get("type") == "Sequence" else [state]


def _is_sentencepiece(steps: list[dict[str, Any]], kinds: list[str]) -> bool:
    if kinds not in (["Replace", "ByteFallback"], ["Replace", "ByteFallback", "Strip"], ["Replace"], ["Replace", "Strip"]):
        return False
    replace = steps[0]
    if replace.get("pattern") != {"String": META} or replace.get("content") != " ":
        return False
    if kinds[-1] != "Strip":
        return True
    # Without Fuse before it, Strip would work on every token instead of the whole text.
    strip = steps[-1]
    fused = len(steps) > 1 and steps[-2]["type"] == "Fuse"
    return fused and (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)


def _letters() -> dict[int, str]:
    """GPT-2's map of bytes to printable characters: printable Latin-1 stands for itself, the rest is moved to 256 and above."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    table.update({b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in table)})
    return table


def _level_bytes(token: str | None, letters: dict[int, str]) -> bytes:
    if token is None:
        return b""
    try:
        return token.translate(letters).encode("latin-1")
    except UnicodeEncodeError:  # an added token spelled as plain text
        return token.encode()


def _piece_bytes(token: str | None, fallback: bool) -> bytes:
    if token is None:
        return b""
    if fallback and len(token) == 6 and (match := _BYTE.fullmatch(token)):
        return bytes((int(match[1], 16),))
    return token.replace(META, " ").encode()
