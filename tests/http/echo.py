"""A small engine for the HTTP tests: real asyncio behaviour, ids that are a function of the prompt alone.

The prompt says what comes out, so that a test can ask for any text: ``...SAY:text`` makes the answer ``text`` (then EOS), anything else
repeats the prompt. Words in the prompt: ``SLOW`` waits between tokens, ``FOREVER`` never ends, ``BOOM`` fails after two tokens,
``REFUSE`` is refused at once, ``LATE`` is refused by the first emission, ``MUTE`` never emits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import presage
from presage.core.errors import GrammarError, Overloaded
from presage.core.request import Emission, Request, TokenLogprobs
from presage.core.types import Kind
from presage.tokenize import Tokenizer

MODEL = Path(presage.__file__).parent / "bundled" / "presage_tiny"
WIDTH = 16


class EchoEngine:
    """An EngineClient. ``chunk`` ids come per emission; ``aborted`` and ``seen`` are for the tests to look at."""

    def __init__(self, max_waiting: int = 64, chunk: int = 1, max_model_len: int = 2048) -> None:
        self.tokenizer = Tokenizer.load(str(MODEL))
        self.chat_template = self.tokenizer.chat_template
        self.model_names, self.max_model_len = ["presage-tiny"], max_model_len
        self.drafting = False
        self.vocab_size, self.eos_ids = self.tokenizer.vocab_size, tuple(self.tokenizer.eos_ids)
        self.max_waiting, self.chunk = max_waiting, chunk
        self.live: dict[str, asyncio.Event] = {}
        self.aborted: list[str] = []
        self.seen: list[Request] = []
        self.alive = True

    async def submit(self, request: Request) -> AsyncIterator[Emission]:
        """See EngineClient."""
        text = self.tokenizer.decode(request.prompt)
        if len(self.live) >= self.max_waiting:
            raise Overloaded("the queue is full", retry_after=3)
        if "REFUSE" in text:
            raise GrammarError("refused", param="structured_outputs")
        self.seen.append(request)
        gone = self.live[request.id] = asyncio.Event()
        return self._stream(request, text, gone)

    async def abort(self, request_id: str) -> None:
        """See EngineClient."""
        self.aborted.append(request_id)
        if request_id in self.live:
            self.live[request_id].set()

    async def health(self) -> bool:
        """See EngineClient."""
        return self.alive

    async def decision_log(self) -> str | None:
        """See EngineClient."""
        return None

    def stats(self) -> dict[str, Any]:
        """See EngineClient."""
        return {
            "running": len(self.live),
            "waiting": 0,
            "kv_cache_usage": 0.25,
            "prefix_queries": 7,
            "prefix_hits": 3,
            "spec_num_accepted_tokens_per_pos": [4, 2],
        }

    async def _stream(self, request: Request, text: str, gone: asyncio.Event) -> AsyncIterator[Emission]:
        try:
            if request.kind is Kind.EMBED:
                yield Emission(request.id, 0, 0, [], pooled=[float(sum(request.prompt.tolist()) % 97), *([1.0] * (WIDTH - 1))])
                yield Emission(request.id, 0, 0, [], finish="done", n_prompt=len(request.prompt))
                return
            async for emission in self._tokens(request, text, gone):
                yield emission
        finally:
            self.live.pop(request.id, None)

    async def _tokens(self, request: Request, text: str, gone: asyncio.Event) -> AsyncIterator[Emission]:
        if "LATE" in text:
            yield Emission(request.id, 0, 0, [], finish="error", error=("invalid_grammar", "late refusal", 400))
        while "MUTE" in text and not gone.is_set():
            await asyncio.sleep(0.01)
        out, limit = self._answer(request, text)
        at, start = 0, time.monotonic()
        while at < limit:
            step = min(self.chunk, limit - at)
            await asyncio.sleep(0.02 if "SLOW" in text or "FOREVER" in text else 0)
            if gone.is_set():
                return
            if "BOOM" in text and at >= 2:
                yield Emission(request.id, 0, at, [], finish="error", error=("step_failed", "boom", 500))
                return
            ids = [out[(at + i) % len(out)] for i in range(step)]
            for branch in range(request.sampling.n):
                yield self._emission(request, branch, at, ids, limit, start)
            at += step

    def _answer(self, request: Request, text: str) -> tuple[list[int], int]:
        said = text.partition("SAY:")[2].partition("<|")[0].removesuffix("\nassistant\n") if "SAY:" in text else ""
        body = self.tokenizer.encode(said, add_special_tokens=False) if said else request.prompt.tolist()
        room = request.sampling.max_tokens or 16
        if "FOREVER" in text:
            return body, 10**6
        ends = bool(said) and not request.sampling.ignore_eos
        out = [*body, self.eos_ids[-1]] if ends else body
        return out, min(room, len(out)) if ends else room

    def _emission(self, request: Request, branch: int, at: int, ids: list[int], limit: int, start: float) -> Emission:
        over = at + len(ids) == limit
        ended = over and ids[-1] in self.eos_ids
        e = Emission(request.id, branch, at, ids, n_prompt=len(request.prompt), n_cached=1)
        e.finish = ("stop" if ended else "length") if over else ""
        e.stop = ids[-1] if ended else None
        e.times = (start, start, time.monotonic())
        if request.sampling.logprobs is not None:
            e.logprobs = [self._logprobs(i, request.sampling.logprobs) for i in ids]
        if request.sampling.prompt_logprobs is not None and at == 0:
            e.prompt_logprobs = [self._logprobs(int(i), request.sampling.prompt_logprobs) for i in request.prompt[1:]]
        return e

    def _logprobs(self, token: int, k: int) -> TokenLogprobs:
        top = [token, *(i for i in range(10, 10 + k) if i != token)][:k]
        return TokenLogprobs(token, -0.5, 1, top, [-0.5 - i if i < 2 else -math.inf for i in range(len(top))])
