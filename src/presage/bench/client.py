"""One streamed request to an OpenAI-compatible server, timed piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from presage.bench.measures import Record

_PREFIX = b"data:"


async def events(stream: Any) -> AsyncIterator[bytes]:
    """Payloads of the ``data:`` lines of a server-sent-event stream; comments and other fields are skipped."""
    rest = b""
    async for piece in stream.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_PREFIX):
                yield line[len(_PREFIX) :].strip()


def text_of(chunk: dict[str, Any]) -> str:
    """New text of a completion or chat chunk, reasoning included."""
    out = ""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            out += choice.get("text") or ""
        else:
            out += (delta.get("content") or "") + (delta.get("reasoning_content") or delta.get("reasoning") or "")
    return out


async def stream_request(session: aiohttp.ClientSession, url: str, body: dict[str, Any], record: Record) -> Record:
    """Send ``body`` and fill ``record``; whatever goes wrong ends up in ``record.error``, so that no request is lost from the count."""
    record.t_send = time.monotonic()
    try:
        async with session.post(url, json=body) as answer:
            if answer.status != 200:
                record.error = f"HTTP {answer.status}: {(await answer.text())[:500]}"
                return record
            await _read(answer.content, record)
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
        record.error = f"{type(error).__name__}: {error}"
    if not record.error and not record.chunks:
        record.error = "the stream held no text"
    return record


async def _read(content: Any, record: Record) -> None:
    ended = False
    async for data in events(content):
        now = time.monotonic()
        if data == b"[DONE]":
            ended = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            record.error = json.dumps(chunk["error"])[:500]
            return
        usage = chunk.get("usage")
        if usage:
            record.n_in, record.n_out = usage.get("prompt_tokens", record.n_in), usage.get("completion_tokens", record.n_out)
        # Role and usage chunks are not output. An answer of special ids alone has no text at all: its end is then its only piece.
        if text_of(chunk) or (not record.chunks and any(c.get("finish_reason") for c in chunk.get("choices") or ())):
            record.chunks.append(now)
    if not ended:
        record.error = "the stream ended without [DONE]"
    if record.chunks:
        record.t_done = record.chunks[-1]
        record.n_out = record.n_out or len(record.chunks)
