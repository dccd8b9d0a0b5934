"""What a step must read and compute, stage by stage, from the sizes of weights and cache: the floor its time is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.core.plan import StepPlan
from presage.execute.executor import TorchExecutor, out_rows
from presage.layers.attention import Attention
from presage.layers.linear import Linear
from presage.layers.mlp import MLP
from presage.layers.moe import Experts
from presage.layers.state import Stage, State


@dataclass(slots=True)
class Work:
    """``nbytes`` read (weights with their scales, keys and values, logits; not activations) and ``operations`` (2 per multiply-add)."""

    nbytes: int = 0
    operations: int = 0

    def __iadd__(self, other: Work) -> Work:
        self.nbytes += other.nbytes
        self.operations += other.operations
        return self


def linear_work(linear: Linear, rows: int) -> Work:
    """One call of a linear layer: its weights are read once, whatever the rows."""
    return Work(sum(p.nbytes for p in linear.packs), 2 * rows * sum(linear.segments) * linear.inner)


def experts_work(experts: Experts, state: State) -> Work:
    """The chosen experts of a routed batch."""
    if state.moe is None:
        return Work()
    active, pairs = int(np.count_nonzero(np.diff(state.moe.offsets.numpy()))), len(state.moe.order)
    each = sum(_packs(packed)[0].nbytes for packed in (experts.gate_up, experts.down))
    return Work(active * each, 6 * pairs * experts.ff * experts.d)


def _packs(experts: Any) -> list[Any]:
    packs: list[Any] = getattr(experts, "packs", experts)
    return packs


def attend_work(executor: TorchExecutor, plan: StepPlan, layer: int) -> Work:
    """Keys and values that the spans of a plan see in one layer, each read once, and the pairs of queries and keys."""
    kv = executor.kv.layers[layer]
    group, spec = executor.geometry.groups[kv.group], kv.spec
    per_token = group.block_bytes // (len({slot for _, slot in group.layers}) * group.block_tokens)
    end = plan.start + plan.count + plan.nodes
    first = np.maximum(0, plan.start + 1 - group.window) if group.window else np.zeros_like(end)
    seen = plan.position.astype(np.int64) + 1
    pairs = int((np.minimum(seen, group.window) if group.window else seen).sum())
    return Work(int((end - first).sum()) * per_token, 4 * pairs * spec.heads * spec.head_dim)


def stage_work(executor: TorchExecutor, plan: StepPlan, layer: int, stage: Stage, state: State) -> Work:
    """One stage of one layer; ``state`` is the one it leaves (experts: the one it takes). Unknown stages count as nothing."""
    owner, rows = getattr(stage.fn, "__self__", None), len(plan.ids)
    match owner:
        case Attention():
            if stage.name == "attend":
                return attend_work(executor, plan, layer)
            return linear_work(owner.qkv if stage.name == "attn_in" else owner.o, rows)
        case MLP():
            up = linear_work(owner.up, rows)
            up += linear_work(owner.down, rows)
            return up
        case Experts() if stage.name == "route":
            return linear_work(owner.router, rows)
        case Experts() if stage.name == "experts":
            return experts_work(owner, state)
    return Work()


def ends_work(executor: TorchExecutor, plan: StepPlan) -> Iterator[tuple[str, Work]]:
    """The parts outside the layers: embedding, head, sampling."""
    model, judged = executor.model, len(out_rows(plan)[0])
    yield "embed", Work(len(plan.ids) * model.embedding.shape[1] * model.embedding.element_size())
    if judged:
        yield "head", linear_work(model.lm_head, judged)
        yield "sampling", Work(judged * model.vocab_size * 4)


def step_bytes(executor: TorchExecutor, plan: StepPlan) -> int:
    """Bytes that a step of a dense model reads."""
    total = Work()
    for layer, block in enumerate(executor.model.layers):
        for stage in block.stages:
            total += stage_work(executor, plan, layer, stage, State(None, None))  # type: ignore[arg-type]
    for _, work in ends_work(executor, plan):
        total += work
    return total.nbytes
