"""The engine in this process under the clock: ``presage bench latency`` and ``presage bench throughput``.

Tokens are stamped when the loop emits them; nothing is detokenised, so the numbers are the engine's own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from presage.bench.datasets import random_ids
from presage.bench.measures import Record
from presage.core.config import EngineConfig
from presage.core.errors import PresageError
from presage.core.request import Emission, Request
from presage.core.sampling_params import SamplingParams
from presage.engine.assemble import error_of
from presage.engine.build import build_engine


class TimedEngine:
    """A built engine whose emissions are stamped and counted."""

    def __init__(self, config: EngineConfig) -> None:
        self.records: dict[str, Record] = {}
        self.engine = build_engine(config, self._take, progress=False)
        self.left = self.runs = 0
        self.failure: PresageError | None = None

    def _take(self, emissions: list[Emission]) -> None:
        now = time.monotonic()
        for e in emissions:
            record = self.records.get(e.id)
            if record is None:
                continue
            if e.error is not None:
                record.error, self.failure = e.error[1], error_of(e.error)
            if e.ids:
                record.chunks.append(now)
                record.n_out += len(e.ids)
            if e.finish or e.error is not None:
                record.t_done = now
                self.left -= 1

    def run(self, prompts: Sequence[list[int]], output_len: int) -> list[Record]:
        """Run all prompts at once to exactly ``output_len`` tokens each. Raises the first refused request's error."""
        self.runs += 1
        names = [f"bench-{self.runs}-{i}" for i in range(len(prompts))]
        params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0.0)
        start = time.monotonic()
        self.records = {name: Record(start, start, n_in=len(ids)) for name, ids in zip(names, prompts)}
        self.left, self.failure = len(prompts), None
        for name, ids in zip(names, prompts):
            self.engine.add(Request(id=name, prompt=np.array(ids, np.int32), sampling=params, arrival=start))
        while self.left:
            self.engine.driver.step()
        if self.failure is not None:
            raise self.failure
        return list(self.records.values())

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Random prompts that share no prefix with those of another seed."""
        info = self.engine.info
        return random_ids(count, length, info.vocab_size, seed, frozenset(info.eos_ids))

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()


def latency(engine: TimedEngine, batch: int, inputs: int, outputs: int, iterations: int, warmups: int, seed: int) -> list[list[Record]]:
    """The records of each measured iteration: one batch that starts together."""
    found = [engine.run(engine.prompts(batch, inputs, seed + i), outputs) for i in range(warmups + iterations)]
    return found[warmups:]


def throughput(engine: TimedEngine, count: int, inputs: int, outputs: int, seed: int) -> dict[str, Any]:
    """All prompts at once: requests/s, tokens/s and output tokens/s over the time to the last token."""
    records = engine.run(engine.prompts(count, inputs, seed), outputs)
    span = max(r.t_done for r in records) - min(r.t_sched for r in records)
    return {
        "elapsed_time": span,
        "num_requests": count,
        "total_num_tokens": count * (inputs + outputs),
        "requests_per_second": count / span,
        "tokens_per_second": count * (inputs + outputs) / span,
        "output_tokens_per_second": count * outputs / span,
    }


def decode_rate(engine: TimedEngine, count: int, inputs: int, outputs: int, seed: int) -> dict[str, Any]:
    """Output tokens/s of decoding alone: the extra tokens of a run of ``2 * outputs`` over one of ``outputs``, by the extra time.

    Both runs prefill the same amount, so its time cancels, as long as all ``count`` requests run at once.
    """
    short = throughput(engine, count, inputs, outputs, seed)["elapsed_time"]
    long = throughput(engine, count, inputs, 2 * outputs, seed + 1)["elapsed_time"]
    return {"short_time": short, "long_time": long, "decode_tokens_per_second": count * outputs / max(long - short, 1e-9)}
