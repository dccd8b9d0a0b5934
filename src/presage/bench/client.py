"""One streamed answer of an OpenAI-compatible server, read piece by piece into a ``Record``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from presage.bench.measures import Record

_PREFIX = b"data:"


class Details(msgspec.Struct):
    """Part of a usage block."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts by the server."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class Delta(msgspec.Struct):
    """What is new in a chat; reasoning has two names in the field."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    """One continuation."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """An event of a stream."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


def text_of(chunk: Chunk) -> str:
    """New text of a completion or chat chunk, reasoning included."""
    out = ""
    for choice in chunk.choices or ():
        delta = choice.delta
        out += choice.text or "" if delta is None else (delta.content or "") + (delta.reasoning_content or delta.reasoning or "")
    return out


def has_output(chunk: Chunk) -> bool:
    """Whether a chunk brings output: text or a piece of a tool call. Role and usage chunks do not."""
    return bool(text_of(chunk)) or any(c.delta is not None and c.delta.tool_calls for c in chunk.choices or ())


class StreamReader:
    """A ``wire.Sink`` that fills ``record``; whatever goes wrong ends up in ``record.error``, so that no request is lost from the count.

    ``ended`` is called once, at the very end. ``keep_text`` collects the answer (the next turn of a conversation needs it).
    """

    def __init__(self, record: Record, ended: Callable[[StreamReader], None], keep_text: bool = False) -> None:
        self.record, self.ended, self.keep_text = record, ended, keep_text
        self.status, self.rest, self.finished = 200, b"", False
        self.said: list[str] = []
        self.counted = 0

    @property
    def text(self) -> str:
        """The answer so far, if it is kept."""
        return "".join(self.said)

    def head(self, status: int) -> None:
        """The status line."""
        self.status = status

    def body(self, data: bytes, now: float) -> None:
        """Lines of server-sent events; comments and other fields are skipped."""
        if self.status != 200:
            self.rest += data
            return
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(_PREFIX) and not self.finished and not self.record.error:
                self._event(line[len(_PREFIX) :].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        record = self.record
        try:
            chunk = _decode(data)
        except msgspec.MsgspecError as error:
            record.error = f"an event is not what it should be: {error}: {data[:200]!r}"
            return
        if chunk.error is not None:
            record.error = msgspec.json.encode(chunk.error).decode()[:500]
            return
        ends = next((c.finish_reason for c in chunk.choices or () if c.finish_reason), "")
        record.finish = ends or record.finish
        # An answer of special ids alone has no text at all: its end is then its only piece.
        if has_output(chunk) or (ends and not record.chunks):
            record.chunks.append(now)
            self._count(chunk.usage)
            if self.keep_text:
                self.said.append(text_of(chunk))
        if chunk.usage is not None:
            self._usage(chunk.usage)

    def _count(self, usage: Usage | None) -> None:
        """Tokens of a piece, if the server says them with every chunk."""
        if usage is not None and usage.completion_tokens is not None:
            self.record.counts.append(usage.completion_tokens - self.counted)
            self.counted = usage.completion_tokens

    def _usage(self, usage: Usage) -> None:
        record, details = self.record, usage.prompt_tokens_details
        record.n_in = usage.prompt_tokens or record.n_in
        record.n_out = usage.completion_tokens or record.n_out
        record.n_cached = (details.cached_tokens if details is not None else None) or record.n_cached

    def end(self, error: str) -> None:
        """The answer is over."""
        record = self.record
        if self.status != 200:
            record.error = f"HTTP {self.status}: {self.rest.decode('utf-8', 'replace')[:500]}"
        elif not record.error:
            record.error = error or ("" if self.finished else "the stream ended without [DONE]")
        if not record.error and not record.chunks:
            record.error = "the stream held no text"
        if record.chunks:
            record.t_done = record.chunks[-1]
            record.n_out = record.n_out or len(record.chunks)
        if len(record.counts) != len(record.chunks):
            record.counts.clear()
        self.ended(self)
