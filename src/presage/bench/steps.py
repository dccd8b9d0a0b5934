"""Steps made by hand on an executor that nobody else uses: sequences of a fixed length, the same step as often as a measurement likes.

The context is computed for real once (by the model, in chunks) and copied to the other sequences block by block, so a step reads what
a step of the engine reads. Nothing is committed afterwards: every step writes the same cache slots again.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from presage.cache.geometry import peak_blocks
from presage.core.errors import ConfigError, StepFailed
from presage.core.kv import KVGroup
from presage.core.plan import BlockTable, Draft, Moves, StepDone, StepPlan
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.core.types import Ints, Want
from presage.execute.executor import TorchExecutor

CHUNK = 512
"""Tokens of context computed in a step, unless said otherwise."""


class FixedSteps:
    """``count`` sequences of ``context`` computed tokens, with room for steps of up to ``rows`` rows each. The context is computed
    ``chunk`` tokens a step.

    The executor's thread must not be running (``TorchExecutor.close``), and all calls must come from one thread: kernels keep a pool of
    threads per caller. Raises ConfigError if the model or its KV cache is too small.
    """

    def __init__(self, executor: TorchExecutor, count: int, context: int, rows: int = 1, seed: int = 0, chunk: int = CHUNK) -> None:
        self.executor, self.count, self.context, self.rows, self.chunk = executor, count, context, rows, max(chunk, rows)
        self.total, self.steps = context + rows, 0
        torch.set_num_threads(1)  # as the executor's own thread does: torch's operators must not open a second team
        self._check()
        self.ids = np.random.default_rng(seed).integers(0, executor.model.vocab_size, (count, self.total)).astype(np.int32)
        self.per = [self._span(g) for g in executor.geometry.groups]
        for g, (per, have) in enumerate(zip(self.per, executor.geometry.num_blocks, strict=True)):
            if 1 + count * per > have:
                raise ConfigError(f"{count} sequences of {self.total} tokens need {1 + count * per} KV blocks in pool {g}, it has {have}")
        greedy = SamplingParams(temperature=0.0, ignore_eos=True)
        for slot in range(count):
            request = Request(id=f"fixed-{slot}", prompt=self.ids[slot, : context + 1], sampling=greedy)
            for companion in executor.companions():
                companion.open(slot, request)
        if context:
            self._fill()

    def _check(self) -> None:
        if min(self.count, self.rows) < 1 or self.context < 0:
            raise ConfigError("a step needs at least one sequence and one row, and a context of zero or more tokens")
        if self.total > self.executor.model.max_len:
            raise ConfigError(f"{self.total} tokens are more than the model's length of {self.executor.model.max_len}", param="context")

    def _span(self, group: KVGroup) -> int:
        """Blocks a sequence needs: those of a window are used in a ring."""
        return group.blocks(self.total) if group.sinks else peak_blocks(group, self.total, self.chunk)

    def _blocks(self, g: int, slot: int, upto: int) -> Ints:
        # Neighbours in a sequence are ``count`` apart in memory, as they are when sequences grow side by side.
        logical = np.arange(self.executor.geometry.groups[g].blocks(upto))
        return (1 + logical % self.per[g] * self.count + slot).astype(np.int32)

    def _fill(self) -> None:
        for start in range(0, self.context, self.chunk):
            self.run(self.plan([0], start, min(self.chunk, self.context - start), want=Want.NONE))
        group, src, dst = [], [], []
        for g in range(len(self.per)):
            mine = np.unique(self._blocks(g, 0, self.context))
            for slot in range(1, self.count):
                group.append(np.full(len(mine), g, np.int32))
                src.append(mine)
                dst.append(mine + slot)
        if group:
            with torch.inference_mode():
                self.executor.kv.move(Moves(np.concatenate(group), np.concatenate(src), np.concatenate(dst)))

    def plan(
        self, slots: list[int] | None = None, start: int = -1, known: int = 1, nodes: int = 0, want: Want = Want.SAMPLE
    ) -> StepPlan:
        """A step of ``known`` tokens and a chain of ``nodes`` draft nodes for each of ``slots`` (all), from ``start`` (the context's end)."""
        chosen, at = list(range(self.count)) if slots is None else slots, self.context if start < 0 else start
        n, rows = len(chosen), known + nodes
        if at + rows > self.total:
            raise ConfigError(f"a step of {rows} rows from token {at} leaves the {self.total} tokens there is room for")
        index = np.tile(np.arange(at, at + rows, dtype=np.int32), n)
        groups = range(len(self.per))
        self.steps += 1
        return StepPlan(
            id=self.steps, lane=0, slot=np.array(chosen, np.int32), start=np.full(n, at, np.int32), count=np.full(n, known, np.int32),
            nodes=np.full(n, nodes, np.int32), layer0=np.zeros(n, np.int32), layer1=np.full(n, self.executor.layers, np.int32),
            want=np.full(n, int(want), np.uint8), rows=np.arange(n + 1, dtype=np.int32) * rows,
            ids=self.ids[chosen, at : at + rows].reshape(-1), position=index, index=index,
            tables=tuple(self._table(g, chosen, at, rows, index) for g in groups),
            draft=Draft.chains([self.ids[s, at + known : at + rows].tolist() for s in chosen]),
            ancestors=_chain(n, known, nodes) if nodes else None,
        )  # fmt: skip

    def _table(self, g: int, slots: list[int], at: int, rows: int, index: Ints) -> BlockTable:
        group = self.executor.geometry.groups[g]
        tables = [self._blocks(g, slot, at + rows) for slot in slots]
        places = index.reshape(len(slots), rows).astype(np.int64)
        slot_of = [t[p // group.block_tokens].astype(np.int64) * group.block_tokens + p % group.block_tokens for t, p in zip(tables, places)]
        for table in tables:
            table[: group.first_kept(at) // group.block_tokens] = 0
        indptr = np.arange(len(slots) + 1, dtype=np.int32) * len(tables[0])
        return BlockTable(indptr, np.concatenate(tables), np.concatenate(slot_of))

    def run(self, plan: StepPlan) -> StepDone:
        """Run a step. Raises StepFailed with what went wrong in it."""
        with torch.inference_mode():
            done = self.executor.step(plan)
        if isinstance(done, StepDone):
            return done
        raise StepFailed(done.error)

    def seconds(self, plan: StepPlan) -> float:
        """Wall seconds of a step."""
        began = time.perf_counter()
        self.run(plan)
        return time.perf_counter() - began

    def close(self) -> None:
        """Give the slots back."""
        for slot in range(self.count):
            for companion in self.executor.companions():
                companion.close(slot)


def _chain(spans: int, known: int, nodes: int) -> np.ndarray:
    """Ancestor bits [rows, words] of a chain of nodes behind ``known`` rows, for every span."""
    words = -(-nodes // 64)
    one = np.zeros((known + nodes, words), np.uint64)
    for j in range(nodes):
        one[known + j] = [((1 << (j + 1)) - 1) >> (64 * w) & ((1 << 64) - 1) for w in range(words)]
    return np.tile(one, (spans, 1))
