"""A model with KV arrays and a planner: what tests of models and of the executor stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from presage.core.kv import KVGeometry
from presage.core.plan import StepPlan
from presage.execute.batch import Batch
from presage.execute.run import Run
from presage.execute.walk import walk
from presage.layers.kv.plain import PlainKV
from presage.layers.ops import build_ops
from presage.models.base import Model
from presage.models.loading import open_checkpoint
from presage.models.registry import build_model
from tests.tiny.families import write_checkpoint
from tests.tiny.plans import Part, Planner

BLOCKS = 24


def load(folder: Path, dtype: torch.dtype = torch.float32, kernels: Any = "cpu", max_len: int | None = None, threads: int = 1) -> Model:
    """The checkpoint of a folder as a model."""
    return build_model(open_checkpoint(str(folder)), dtype, build_ops(kernels, dtype, threads), max_len=max_len)


def tiny(case: str, folder: Path, dtype: torch.dtype = torch.float32, kernels: Any = "cpu", shard: str = "5GB") -> tuple[Any, Model]:
    """A case of ``families`` written to ``folder``: transformers' model and ours."""
    reference = write_checkpoint(case, folder, dtype, shard=shard)
    return reference, load(folder, dtype, kernels, max_len=256)


def geometry_of(model: Model, blocks: int = BLOCKS, block_size: int = 32) -> KVGeometry:
    """Geometry with ``blocks`` blocks in every group."""
    groups = model.kv_groups(block_size)
    return KVGeometry(groups=groups, num_blocks=(blocks,) * len(groups))


class Rig:
    """Runs plans through the walk without an executor. All KV is NaN at first, so a read of an unwritten key shows."""

    def __init__(self, model: Model, block_size: int = 32) -> None:
        self.model, self.geometry = model, geometry_of(model, block_size=block_size)
        self.kv = PlainKV(model, self.geometry)
        self.poison()
        self.run = Run(model, self.kv)
        self.planner = Planner(self.geometry, len(model.layers))

    def poison(self) -> None:
        """Fill every block with NaN."""
        for arrays in self.kv.groups:
            for keys, values in arrays:
                keys.fill_(float("nan"))
                values.fill_(float("nan"))

    def hidden(self, plan: StepPlan) -> torch.Tensor:
        """Residual stream [T, d] of a plan."""
        with torch.inference_mode():
            return walk(self.run, plan, Batch.of(plan, plan.ids, self.geometry, self.run.ops)).clone()

    def logits(self, parts: list[Part]) -> list[torch.Tensor]:
        """Logits [rows, V] of every span."""
        plan = self.planner.plan(parts)
        h = self.hidden(plan)
        with torch.inference_mode():
            out = self.model.head(h, self.run.work).clone()
        return [out[int(a) : int(b)] for a, b in zip(plan.rows, plan.rows[1:], strict=False)]
