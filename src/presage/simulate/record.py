"""Steps of a real engine for a fit: waves of requests that take it through its batch sizes, chunk lengths and contexts.

The engine is handed in, built elsewhere with a decision log, so that nothing here needs what an engine needs.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from presage import __version__
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.events import Arrive
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.simulate.latency.fitted import Fitted, fit, steps_of_log


class Driven(Protocol):
    """A built engine (``engine.build.Engine``), with a decision log."""

    config: EngineConfig
    loop: Any
    driver: Any
    info: Any


def profile(engine: Driven, seconds: float, *, power: tuple[float, float] = (0.0, 0.0), about: dict[str, Any] | None = None) -> Fitted:
    """Run waves for ``seconds`` and fit their steps; the decision log is read, so it should be fresh. Raises ConfigError without one."""
    folder = engine.config.observability.decision_log
    if folder is None:
        raise ConfigError("a profile is read from a decision log: build the engine with one", param="decision_log")
    info, s = engine.info, engine.config.scheduler
    length = min(info.max_model_len, 4096, engine.loop.kv.geometry.num_blocks[0] * engine.loop.kv.geometry.groups[0].block_tokens // 2)
    for wave in waves(s.max_num_seqs, length, info.vocab_size, seconds):
        run_together(engine, wave)
    engine.loop.log.flush()
    known = {
        "model": info.name, "dtype": info.dtype, "quantization": engine.config.model.quantization, "max_num_seqs": s.max_num_seqs,
        "max_num_batched_tokens": s.max_num_batched_tokens, "machine": platform.processor() or platform.machine(), "presage": __version__,
    }  # fmt: skip
    return fit(*steps_of_log(folder), power=power, about={**known, **(about or {})})


def waves(seats: int, length: int, vocab: int, seconds: float, seed: int = 0) -> Iterator[list[Request]]:
    """Waves of 1, 2, 4, ... ``seats`` requests of random lengths within ``length`` tokens, again and again for ``seconds``."""
    rng, began, n = np.random.default_rng(seed), time.monotonic(), 0
    sizes = [*(1 << k for k in range(seats.bit_length()) if 1 << k < seats), seats]
    while time.monotonic() - began < seconds:
        for size in sizes:
            # Lengths by powers of two: many short ones, some that fill the context. Answers as long as chats have them: arrivals and ends cost the
            # host time too, and no term knows of them.
            n_in = np.minimum(length - 2, 2 ** rng.uniform(1, np.log2(length), size)).astype(int)
            n_out = np.maximum(1, np.minimum(length - n_in - 1, 2 ** rng.uniform(1, 7, size))).astype(int)
            yield [greedy(f"wave-{n + i}", rng.integers(0, vocab, a), int(b)) for i, (a, b) in enumerate(zip(n_in.tolist(), n_out.tolist()))]
            n += size
            if time.monotonic() - began >= seconds:
                return


def greedy(name: str, prompt: np.ndarray, tokens: int, arrival: float = 0.0) -> Request:
    """A request for exactly ``tokens`` ids that nobody reads."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return Request(id=name, prompt=np.asarray(prompt, np.int32), sampling=params, arrival=arrival, sink="profile")


def run_together(engine: Driven, requests: Sequence[Request]) -> None:
    """All at once; returns when the engine is idle."""
    for request in requests:
        engine.driver.post(Arrive(request))
    engine.driver.step()
    while not engine.loop.idle:
        engine.driver.step()


def run_open(engine: Driven, requests: Sequence[Request]) -> None:
    """Each at its ``arrival`` seconds from now, whatever the engine does meanwhile; returns when all have ended."""
    began, sent = time.monotonic(), threading.Event()

    def send() -> None:
        for request in requests:
            time.sleep(max(0.0, began + request.arrival - time.monotonic()))
            engine.driver.post(Arrive(msgspec.structs.replace(request, arrival=time.monotonic())))
        sent.set()

    threading.Thread(target=send, name="presage-arrivals", daemon=True).start()
    while not (sent.is_set() and engine.driver.inbox.empty() and engine.loop.idle):
        if not engine.driver.step(block=not (engine.loop.idle and engine.driver.inbox.empty())):
            time.sleep(1e-4)
