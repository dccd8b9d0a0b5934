"""The torch executor: one worker thread that runs plans in the order in which they were submitted, and posts what came of them."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from presage.core.errors import StepFailed
from presage.core.events import Event
from presage.core.kv import KVGeometry
from presage.core.plan import NewIds, StepDone, StepFault, StepPlan
from presage.core.protocols import Companion
from presage.core.request import Request
from presage.core.types import Ints, Want
from presage.execute.batch import Batch
from presage.execute.pool import Pool, Pooling
from presage.execute.propose import pass_rows, propose
from presage.execute.run import Run
from presage.execute.walk import walk
from presage.layers.kv.plain import PlainKV
from presage.models.base import Model

_EXPORTS = int(Want.POOL | Want.PROMPT_LOGPROBS)
_SAMPLE, _POOL, _LOGPROBS, _TOPK = int(Want.SAMPLE), int(Want.POOL), int(Want.PROMPT_LOGPROBS), int(Want.TOPK)

LOGIT_ROWS = 64
"""Rows whose logits are made at once for prompt log-probabilities: a [rows, V] float32 matrix is as large as a small model."""


class Judge(Companion, Protocol):
    """The sampler, as the executor uses it."""

    def judge(self, logits: torch.Tensor, plan: StepPlan, row_span: Ints, row_node: Ints, masks: Any = None) -> Any:
        """Decide ids: ``new_off``, ``new``, ``path_off``, ``path``, ``logprobs``."""

    def prompt_logprobs(self, logits: torch.Tensor, plan: StepPlan, span: int, row: int = 0) -> Any:
        """Log-probabilities of a prompt's own next ids; ``row`` is the place of the first logits row in the span."""


class TorchExecutor:
    """Implements ``core.protocols.Executor`` on one model and those that draft for it.

    ``geometry``: KV groups and blocks; ``sampler``: judges logits; ``depth``: steps that may be in flight; ``kv_cache_dtype``: as in
    ``CacheConfig``, and as the geometry was made with. A step that raises is posted as
    a StepFault of its slots (or of those that its StepFailed names), and the executor goes on. ``submit`` never blocks.
    ``lanes``: models of lanes 1 and up with their geometries; each has KV arrays of its own, all share the team and the sampler's state.
    """

    def __init__(
        self,
        model: Model,
        geometry: KVGeometry,
        sampler: Judge,
        *,
        pooling: Pooling = "last",
        depth: int = 2,
        kv_cache_dtype: str = "auto",
        lanes: Sequence[tuple[Model, KVGeometry]] = (),
    ) -> None:
        self.model, self.geometry, self.sampler, self.depth = model, geometry, sampler, depth
        self.layers = len(model.layers)
        self.kv = PlainKV(model, geometry, kv_cache_dtype)
        self.run = Run(model, self.kv)
        self.lanes = (self.run, *(Run(m, PlainKV(m, g, kv_cache_dtype)) for m, g in lanes))
        self.pool = Pool(pooling)
        self._last = np.zeros(64, np.int32)
        self._queue: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._post: Callable[[Event], None] = _unstarted

    def start(self, post: Callable[[Event], None]) -> None:
        """Start the worker; ``post`` is called from its thread."""
        self._post = post
        self._thread = threading.Thread(target=self._work, name="presage-executor", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a step."""
        self._queue.put(plan)

    def cut(self) -> None:
        """End a burst early. Every plan here is one step, so the step in flight is already the last."""

    def companions(self) -> tuple[Companion, ...]:
        """The sampler's per-request state, and the executor's own (banked rows, pools)."""
        return (self.sampler, SlotState(self))

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    # -- the worker ------------------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        # A torch operator that opened a parallel region would fight the kernels' team for the cores.
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (plan := self._queue.get()) is not None:
                self._post(self.step(plan))

    def step(self, plan: StepPlan) -> StepDone | StepFault:
        """Run one plan in the calling thread."""
        t0 = time.monotonic()
        try:
            return self._step(plan, t0)
        except Exception as error:  # whatever a step raises ends its own requests, never the engine
            text = error.message if isinstance(error, StepFailed) else "".join(traceback.format_exception_only(error)).strip()
            named = error.details.get("slots") if isinstance(error, StepFailed) else None
            return StepFault(plan.id, text, np.unique(plan.slot) if named is None else np.asarray(named, np.int32))

    def _step(self, plan: StepPlan, t0: float) -> StepDone:
        if plan.lane >= len(self.lanes):
            raise StepFailed(f"lane {plan.lane} needs a model of its own; this executor holds {len(self.lanes)}")
        if len(plan.moves):
            self.lanes[plan.lane].kv.move(plan.moves)
        done = StepDone(plan.id, t0, t0, np.zeros(plan.spans + 1, np.int32), np.empty(0, np.int32), np.zeros(plan.spans + 1, np.int32))
        if len(plan.ids):
            self._forward(plan, done)
        done.t1 = time.monotonic()
        return done

    def _forward(self, plan: StepPlan, done: StepDone) -> None:
        run = self.lanes[plan.lane]
        if plan.work and plan.work[0].fresh:
            for slot in plan.slot.tolist():
                run.bank.drop(slot)
        h = walk(run, plan, Batch.of(plan, self._ids(plan, run.model), run.kv.geometry, run.ops))
        if plan.work and (plan.want & _TOPK).any():
            row, span, node = pass_rows(plan)
            logits = run.model.head(h[torch.from_numpy(row).long()], run.work)
            done.exports["proposed"] = {0: propose(logits, plan, span, node, self.sampler)}
        row, span, node = out_rows(plan)
        if len(row):
            self._judge(plan, h, row, span, node, done)
        if (plan.want & _EXPORTS).any():
            self._export(plan, h, done)

    def _ids(self, plan: StepPlan, model: Model) -> Ints:
        if plan.ids.max() >= model.vocab_size:
            raise StepFailed(f"token id {plan.ids.max()} is outside the vocabulary of {model.vocab_size}")
        if plan.position.max() >= model.max_len:
            raise StepFailed(f"position {plan.position.max()} is beyond the model's length of {model.max_len}")
        if plan.ids.min() >= 0:
            return plan.ids
        fed = np.flatnonzero(plan.ids < 0)
        slots = plan.slot[np.searchsorted(plan.rows, fed, side="right") - 1]
        ids = plan.ids.copy()
        ids[fed] = self._last[slots]
        return ids

    def _judge(self, plan: StepPlan, h: torch.Tensor, row: Ints, span: Ints, node: Ints, done: StepDone) -> None:
        whole = len(row) == len(h)
        logits = self.model.head(h if whole else h[torch.from_numpy(row).long()], self.run.work)
        verdict = self.sampler.judge(logits, plan, span, node, masks=None if plan.late is None else mask_rows(plan, plan.late, span))
        done.new_off, done.new, done.logprobs = verdict.new_off, verdict.new, verdict.logprobs
        done.path_off, done.path = verdict.path_off, verdict.path
        self._remember(plan.slot, verdict.new_off, verdict.new)

    def _remember(self, slot: Ints, off: Ints, new: Ints) -> None:
        got = off[1:] > off[:-1]
        slots = slot[got]
        if len(slots):
            if (top := int(slots.max())) >= len(self._last):
                self._last = np.concatenate([self._last, np.zeros(max(len(self._last), top + 1 - len(self._last)), np.int32)])
            self._last[slots] = new[off[1:][got] - 1]

    def _export(self, plan: StepPlan, h: torch.Tensor, done: StepDone) -> None:
        for s in np.flatnonzero(plan.layer1 == self.layers).tolist():
            a, b = int(plan.rows[s]), int(plan.rows[s]) + int(plan.count[s])
            if plan.want[s] & _LOGPROBS:
                out = done.exports.setdefault("prompt_logprobs", {}).setdefault(s, [])
                for at in range(a, b, LOGIT_ROWS):
                    logits = self.model.head(h[at : min(b, at + LOGIT_ROWS)], self.run.work)
                    out.extend(self.sampler.prompt_logprobs(logits, plan, s, at - a))
            if plan.want[s] & _POOL:
                hidden = self.model.final_norm(h[a:b], torch.empty(b - a, h.shape[1]))
                done.exports.setdefault("pooled", {})[s] = self.pool.add(int(plan.slot[s]), int(plan.start[s]), hidden)


class SlotState:
    """Companion that forgets what the executor keeps by slot when a request enters or leaves it."""

    def __init__(self, executor: TorchExecutor) -> None:
        self._executor = executor

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot; it may ask for its own pooling."""
        self.close(slot)
        if (asked := req.extras.get("pooling")) in ("mean", "last"):
            self._executor.pool.asked[slot] = asked

    def advance(self, new: NewIds) -> None:
        """Nothing here depends on ids."""

    def rewind(self, slot: int, known: int) -> None:
        """Nothing here depends on ids."""

    def fork(self, src: int, dst: int, req: Request) -> None:
        """A branch starts with no banked rows."""
        self.close(dst)

    def save(self, slot: int) -> bytes | None:
        """Nothing to migrate: banked rows are recomputed."""
        return None

    def load(self, slot: int, blob: bytes) -> None:
        """Nothing was saved."""

    def close(self, slot: int) -> None:
        """The request left the slot."""
        self._executor.run.bank.drop(slot)
        self._executor.pool.drop(slot)


def out_rows(plan: StepPlan) -> tuple[Ints, Ints, Ints]:
    """Rows whose logits are judged, with their span and node (-1 = the span's last known row): SAMPLE spans, in plan order."""
    wants = np.flatnonzero(plan.want & _SAMPLE)
    nodes = plan.nodes[wants]
    per = nodes + 1
    span = np.repeat(wants, per).astype(np.int32)
    first = np.repeat(np.cumsum(per) - per, per)
    node = (np.arange(len(span)) - first - 1).astype(np.int32)
    row = (plan.rows[span] + plan.count[span] + node).astype(np.int32)
    return row, span, node


def mask_rows(plan: StepPlan, late: Any, span: Ints) -> tuple[Ints, np.ndarray]:
    """Grammar masks by judged row: ``late.masks()`` names rows by (span, node), the sampler by their place in the logits."""
    pairs, bits = late.masks()
    pairs = np.asarray(pairs, np.int32).reshape(-1, 2)
    first = np.searchsorted(span, pairs[:, 0])
    return (first + 1 + pairs[:, 1]).astype(np.int32), bits


def _unstarted(event: Event) -> None:
    raise RuntimeError("the executor was not started")
