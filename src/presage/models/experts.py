"""Builds the expert half of a layer from a checkpoint with one set of tensors per expert."""

from __future__ import annotations

from presage.core.errors import CheckpointError
from presage.layers.moe import Experts
from presage.layers.norm import Norm
from presage.models.base import Model


def expert_half(model: Model, i: int, before: Norm | None) -> Experts:
    """The experts of layer i; parts ``router``, ``expert_gate``, ``expert_up``, ``expert_down`` (with ``{e}``) of the family's names."""
    moe, w = model.params.moe[i], model.weights
    if moe is None or before is None:
        raise CheckpointError(f"layer {i} has no experts")
    count = w.get("router", i).shape[0]  # pruned checkpoints keep fewer than the configuration says
    gate_up = ((model.weight("expert_gate", i, e), model.weight("expert_up", i, e)) for e in range(count))
    down = (model.weight("expert_down", i, e) for e in range(count))
    router = model.linear("router", ("router",), i)
    return Experts(model.ops, router, gate_up, down, moe.top_k, moe.normalise, moe.ff, f"{model.params.act}_mul", before)
