"""``AsyncLLM``: the same loop in a thread, driven from asyncio. Also the in-process engine client of the HTTP front."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

from presage.core.config import EngineConfig
from presage.core.errors import EngineDead, PresageError
from presage.core.events import Drain
from presage.core.request import Emission, Request
from presage.core.sampling_params import SamplingParams
from presage.draft.settings import parse_speculative
from presage.engine.assemble import Assembler
from presage.engine.build import Engine, build_engine
from presage.engine.inputs import Prompt, make_request, prompt_ids
from presage.engine.outputs import CompletionOutput, RequestOutput
from presage.engine.streams import until_ended

FLUSH_SECONDS = 2.0
_log = logging.getLogger("presage.engine")


class EngineThread:
    """Runs an engine's driver in a thread and hands emissions to asyncio queues by request id."""

    def __init__(self, config: EngineConfig, progress: bool = False) -> None:
        self.queues: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Emission | PresageError]]] = {}
        self.lock = threading.Lock()
        self.engine: Engine = build_engine(config, self._deliver, progress=progress)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="presage-loop", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.driver.run()
        except BaseException as error:
            _log.exception("the engine loop ended")
            self.failure = error
            with self.lock:
                waiting = list(self.queues.values())
            for loop, queue in waiting:
                loop.call_soon_threadsafe(queue.put_nowait, EngineDead(f"the engine stopped: {error}"))

    def _deliver(self, emissions: list[Emission]) -> None:
        batches: dict[int, tuple[asyncio.AbstractEventLoop, list[tuple[Any, Emission]]]] = {}
        with self.lock:
            for e in emissions:
                if e.id in self.queues:
                    loop, queue = self.queues[e.id]
                    batches.setdefault(id(loop), (loop, []))[1].append((queue, e))
        for loop, items in batches.values():
            # One wake-up of the event loop per step, not one per token.
            loop.call_soon_threadsafe(_put_all, items)

    async def submit(self, request: Request) -> AsyncIterator[Emission]:
        """Queue a request and yield its emissions until every branch ended. Abandoning the iterator aborts the request."""
        if self.failure is not None:
            raise EngineDead(f"the engine stopped: {self.failure}")
        queue: asyncio.Queue[Emission | PresageError] = asyncio.Queue()
        with self.lock:
            self.queues[request.id] = (asyncio.get_running_loop(), queue)
        ended = False
        try:
            self.engine.add(request)
            async for emission in until_ended(queue, request.sampling.n):
                yield emission
            ended = True
        except PresageError:
            ended = True
            raise
        finally:
            with self.lock:
                self.queues.pop(request.id, None)
            if not ended:
                self.engine.abort(request.id)

    def close(self) -> None:
        """Stop the loop and the executor."""
        self.engine.driver.stop()
        self.thread.join(timeout=30)
        self.engine.close()


def _put_all(items: list[tuple[Any, Emission]]) -> None:
    for queue, emission in items:
        queue.put_nowait(emission)


class AsyncLLM:
    """An engine for asyncio programs (vLLM's name). Build it with ``from_engine_args(model=..., **settings)``."""

    def __init__(self, config: EngineConfig, progress: bool = False) -> None:
        self.config = config
        self.runner = EngineThread(config, progress)
        info = self.runner.engine.info
        self.drafting = parse_speculative(config.speculation.speculative_config) is not None
        self.tokenizer = self.runner.engine.tokenizer
        self.model_names = list(config.model.served_model_name) or [config.model.model]
        self.max_model_len, self.vocab_size, self.eos_ids = info.max_model_len, info.vocab_size, info.eos_ids

    @classmethod
    def from_engine_args(cls, **settings: Any) -> AsyncLLM:
        """From flat settings, as ``LLM`` takes them."""
        return cls(EngineConfig.of(**settings))

    @property
    def chat_template(self) -> Any:
        """The model's chat template, or None."""
        return self.tokenizer.chat_template

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str | None = None, **fields: Any
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they grow: cumulative by default, new text and ids only for ``output_kind="delta"``, once for ``final_only``."""
        ids, text = prompt_ids(prompt, self.tokenizer)
        request = make_request(ids, sampling_params, self.tokenizer, request_id, **fields)
        assembler, kind = Assembler(request, self.tokenizer, text), request.sampling.output_kind
        async for emission in self.submit(request):
            before = assembler.output.outputs[emission.branch]
            at, chars = len(before.token_ids), len(before.text)
            out = assembler.add(emission)
            if kind == "delta":
                part = CompletionOutput(out.index, out.text[chars:], out.token_ids[at:], None, None, out.finish_reason, out.stop_reason)
                yield RequestOutput(request.id, text, assembler.output.prompt_token_ids, [part], assembler.done)
            elif kind == "cumulative" or assembler.done:
                yield assembler.output

    def submit(self, request: Request) -> AsyncIterator[Emission]:
        """The front's way in: emissions of one request."""
        return self.runner.submit(request)

    async def abort(self, request_id: str) -> None:
        """End a request in any state; unknown ids are ignored."""
        self.runner.engine.abort(request_id)

    async def health(self) -> bool:
        """Whether the loop is alive."""
        return self.runner.failure is None and self.runner.thread.is_alive()

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self.runner.engine.stats()

    async def decision_log(self) -> str | None:
        """Folder of the decision log, written out; None without one."""
        folder, engine = self.config.observability.log_folder, self.runner.engine
        if folder is not None and await self.health():
            loop, done = asyncio.get_running_loop(), asyncio.Event()

            def flush() -> None:
                engine.loop.log.flush()
                loop.call_soon_threadsafe(done.set)

            engine.driver.call(flush)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), FLUSH_SECONDS)
        return folder

    async def drain(self) -> None:
        """Take no new requests and wait until the running ones ended."""
        self.runner.engine.driver.post(Drain())
        while not self.runner.engine.loop.idle:
            await asyncio.sleep(0.02)

    def shutdown(self) -> None:
        """Stop the engine."""
        self.runner.close()
