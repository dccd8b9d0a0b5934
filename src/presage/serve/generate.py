"""From emissions to text: one ``Generation`` per engine request, one ``Branch`` per continuation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from presage.core.errors import PresageError
from presage.core.request import Emission, Request, TokenLogprobs
from presage.serve.client import open_stream
from presage.serve.errors import from_emission
from presage.serve.front import Front
from presage.serve.timing import Timing
from presage.tokenize import Detokenizer, StopChecker, Tokenizer


class Delta(msgspec.Struct):
    """What one emission adds to one continuation. ``text`` lags behind ``ids`` while it could become a stop string."""

    branch: int
    text: str
    ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: str = ""
    stop: int | str | None = None

    def add(self, other: Delta) -> None:
        """Append a later addition to the same continuation."""
        self.text += other.text
        self.ids += other.ids
        self.logprobs += other.logprobs
        self.finish, self.stop = other.finish, other.stop


class Branch:
    """Text of one continuation. Ids that a stop string makes superfluous are dropped; an end token has no text."""

    def __init__(self, tokenizer: Tokenizer, request: Request, eos_ids: Sequence[int]) -> None:
        sampling = request.sampling
        self.text = Detokenizer(tokenizer, request.prompt, sampling.skip_special_tokens)
        self.stops = StopChecker(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        self.include, self.min_tokens = sampling.include_stop_str_in_output, sampling.min_tokens
        self.stop_ids = frozenset(sampling.stop_token_ids or ())
        self.end_ids = self.stop_ids if sampling.ignore_eos else self.stop_ids | frozenset(eos_ids)
        self.n, self.finish = 0, ""

    def push(self, e: Emission) -> Delta | None:
        """The addition, or None for a repeated emission or after the end."""
        # A restarted engine may send ids again that the client already has.
        known = max(0, self.n - e.offset)
        ids, logprobs = e.ids[known:], (e.logprobs or [])[known:]
        if self.finish or (not ids and not e.finish):
            return None
        return self._stopped(self.stops, e, ids, logprobs) if self.stops else self._free(e, ids, logprobs)

    def _free(self, e: Emission, ids: list[int], logprobs: list[TokenLogprobs]) -> Delta:
        self.n += len(ids)
        self.finish = e.finish
        text = self.text.push(self._shown(e, ids))
        return Delta(e.branch, text + self.text.finish() if e.finish else text, ids, logprobs, e.finish, self._reason(e, ids))

    def _stopped(self, stops: StopChecker, e: Emission, ids: list[int], logprobs: list[TokenLogprobs]) -> Delta:
        out = ""
        for used, token in enumerate(self._shown(e, ids), 1):
            # One id at a time: with several per step, those after the stop string must not be counted or shown.
            text, hit = stops.push(self.text.push([token]), self.n + used > self.min_tokens)
            out += text
            if hit is not None:
                return self._hit(Delta(e.branch, out, ids[:used], logprobs[:used], "stop", hit))
        if e.finish:
            text, hit = stops.push(self.text.finish(), self.n + len(ids) > self.min_tokens)
            out += text
            if hit is not None:
                return self._hit(Delta(e.branch, out, ids, logprobs, "stop", hit))
            out += stops.flush()
        self.n += len(ids)
        self.finish = e.finish
        return Delta(e.branch, out, ids, logprobs, e.finish, self._reason(e, ids))

    def _hit(self, delta: Delta) -> Delta:
        self.n += len(delta.ids)
        self.finish = "stop"
        return delta

    def _shown(self, e: Emission, ids: list[int]) -> list[int]:
        # Templates end a turn with a token that is no part of the answer, also when special tokens are shown.
        hidden = e.finish == "stop" and ids and ids[-1] in self.end_ids and not self.include
        return ids[:-1] if hidden else ids

    def _reason(self, e: Emission, ids: list[int]) -> int | str | None:
        if e.finish != "stop":
            return None
        return ids[-1] if ids and ids[-1] in self.stop_ids else e.stop if isinstance(e.stop, str) else None


class Generation:
    """One engine request on its way: iterate ``deltas()`` once. Leaving early, for whatever reason, aborts it in the engine.

    ``n_cached``, ``pooled`` and ``prompt_logprobs`` are filled as emissions bring them.
    """

    def __init__(self, front: Front, request: Request) -> None:
        self.front, self.request = front, request
        client = front.client
        self.branches = [Branch(client.tokenizer, request, client.eos_ids) for _ in range(request.sampling.n)]
        self.n_prompt, self.n_cached = len(request.prompt), 0
        self._scores: list[TokenLogprobs | None] = []
        self._scored = -1  # branch that _scores are from
        self.pooled: list[float] | None = None
        self._open = request.sampling.n  # branches that the engine has not ended
        self._left = request.sampling.n  # branches that the client still waits for
        self.timing = Timing(front.metrics, request, front.clock)

    @property
    def n_output(self) -> int:
        """Tokens generated so far over all branches."""
        return sum(b.n for b in self.branches)

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None]:
        """One entry per prompt token: None for the first, which nothing predicts, and for those that the engine did not score."""
        n = self.n_prompt
        return [None, *self._scores, *([None] * n)][:n]

    async def deltas(self) -> AsyncIterator[Delta]:
        """Additions in the order in which they come. Errors: whatever the engine refused or failed with."""
        front, stream = self.front, None
        front.live += 1
        try:
            stream = await open_stream(front.client, self.request)
            async for emission in stream:
                delta = self._take(emission)
                if delta is not None:
                    yield delta
                if not self._left:
                    break
            self.timing.close(self.n_prompt, self.n_output, not self._left)
        except PresageError as error:
            front.metrics.failed(error.code)
            raise
        finally:
            front.live -= 1
            await self._leave(stream)

    def _take(self, e: Emission) -> Delta | None:
        if e.error is not None:
            raise from_emission(e.error)
        self.n_cached = max(self.n_cached, e.n_cached)
        if e.prompt_logprobs and self._scored in (-1, e.branch):
            # A chunked prompt brings its part with each chunk; branches that compute the prompt again bring the same.
            self._scored = e.branch
            self._scores += e.prompt_logprobs
        if e.pooled is not None:
            self.pooled = e.pooled
        self._open -= bool(e.finish)
        delta = self.branches[e.branch].push(e)
        if delta is not None:
            self._left -= bool(delta.finish)
            self.timing.note(e, len(delta.ids), delta.finish)
        return delta

    async def _leave(self, stream: Any) -> None:
        # The engine learns of a stop string that only the text showed, and of a client that went away, in the same way.
        # An engine that ended every branch by itself needs no abort, which would cost a message per request.
        if self._open:
            with suppress(Exception):
                await self.front.client.abort(self.request.id)
        close = getattr(stream, "aclose", None)
        if close is not None:
            with suppress(Exception):
                await close()


async def merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several requests as they come, each with its request's index; the first error ends all of them."""
    if len(generations) == 1:
        stream = generations[0].deltas()
        try:
            async for delta in stream:
                yield 0, delta
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        return
    # Unbounded is safe: it holds at most max_tokens entries per branch, and the reader is the only brake there is.
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_drain(i, g, queue)) for i, g in enumerate(generations)]
    try:
        open_ones = len(tasks)
        while open_ones:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_ones -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(index: int, generation: Generation, queue: asyncio.Queue[Any]) -> None:
    stream = generation.deltas()
    try:
        async for delta in stream:
            queue.put_nowait((index, delta))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


def ids_array(ids: Sequence[int]) -> np.ndarray:
    """Ids as the engine wants them: int32[n]."""
    return np.asarray(ids, np.int32)
