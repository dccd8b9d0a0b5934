"""The places of a model that calibration works on: one weight over one input, where its parts lie in the checkpoint, and who makes its input.

Folding: inputs divided by s and weight columns multiplied by s are the same function, and the division costs nothing where the producer of
the inputs (a norm's gain, the rows of the linear before it) takes it up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from presage.core.errors import UnsupportedModel
from presage.layers.linear import Linear
from presage.layers.mlp import MLP
from presage.layers.moe import Experts
from presage.layers.norm import Norm, RMSNorm
from presage.models.base import Model
from presage.models.pad import WideHeads
from presage.quantize.observe import Cell

Changes = dict[str, torch.Tensor]
"""Dense tensors that are no longer the checkpoint's, by name."""


@dataclass(frozen=True, slots=True)
class Gain:
    """The producer is a norm: its gain is stored as gain - ``offset`` in the tensor ``name`` of type ``dtype``."""

    norm: RMSNorm
    name: str
    dtype: torch.dtype
    offset: float

    def shared(self, s: torch.Tensor) -> torch.Tensor:
        """Every input has a gain of its own."""
        return s

    def divide(self, s: torch.Tensor) -> tuple[torch.Tensor, Changes]:
        """Divide the outputs by about s [K]; returns by what exactly, since the gain is stored rounded, and the tensors that changed."""
        gain = self.norm.weight
        kept = (gain / s - self.offset).to(self.dtype)
        now = kept.float() + self.offset
        # A gain of nothing, or one that would round to nothing, stays what it was.
        fine = (gain != 0) & (now != 0)
        exact = torch.where(fine, gain / torch.where(fine, now, torch.ones_like(now)), torch.ones_like(s))
        kept = torch.where(fine, kept, (gain - self.offset).to(self.dtype))
        gain.copy_(torch.where(fine, now, gain))
        return exact, {self.name: kept}


@dataclass(frozen=True, slots=True)
class RowsOf:
    """The producer is outputs [start, stop) of a linear (not quantised yet), with their ``bias`` (a view, stored as ``bias_name``).

    ``repeat``: neighbouring blocks of ``block`` inputs that come from the same outputs (query heads that share a value head).
    """

    cell: Cell
    start: int
    stop: int
    block: int = 1
    repeat: int = 1
    bias: torch.Tensor | None = None
    bias_name: str = ""
    dtype: torch.dtype = torch.float32

    def shared(self, s: torch.Tensor) -> torch.Tensor:
        """[K] made equal over inputs that come from the same output, by the mean."""
        heads = s.view(-1, self.repeat, self.block)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    def divide(self, s: torch.Tensor) -> tuple[torch.Tensor, Changes]:
        """Divide the outputs by s [K], which is ``shared``; returns it and the tensors that changed."""
        rows, w = s.view(-1, self.repeat, self.block)[:, 0].reshape(-1), self.cell.dense().clone()
        w[self.start : self.stop] /= rows[:, None]
        self.cell.weight = w
        if self.bias is None:
            return s, {}
        self.bias.div_(rows)
        return s, {self.bias_name: self.bias.to(self.dtype)}


@dataclass(slots=True)
class Site:
    """A weight over one input. ``parts``: the checkpoint's tensors in it from top to bottom, with their rows. ``source`` None: nobody can
    take up a scale of the input."""

    name: str
    cell: Cell
    parts: list[tuple[str, int]]
    source: Gain | RowsOf | None = None

    def shared(self, of_inputs: torch.Tensor) -> torch.Tensor:
        """Values of inputs [K], made equal where one output of the producer feeds several."""
        return of_inputs if self.source is None else self.source.shared(of_inputs)

    def fold(self, s: torch.Tensor) -> Changes:
        """Divide the input by s [K] (``shared``) where it is made and multiply the weight; the float function stays the same."""
        if self.source is None:
            return {}
        s, changes = self.source.divide(s)
        self.cell.weight = self.cell.dense() * s
        if self.cell.stats is not None:
            self.cell.stats.scaled(s)
        return changes


def sites_of(model: Model, i: int) -> list[Site]:
    """The sites of layer i in the order they run. Raises UnsupportedModel for a family whose weights are not where Llama's are."""
    if model.params.model_type == "gpt2":
        raise UnsupportedModel("gpt2 stores its matrices transposed, for which there is no quantised format", param="model")
    if isinstance(model.weights, WideHeads):
        raise UnsupportedModel("heads whose size is no multiple of 16 are padded for the kernels and cannot be calibrated", param="model")
    attention, mlp, p = model.layers[i].attention, model.layers[i].mlp, model.params
    qkv = _site(model, i, attention.qkv, ("q", "k", "v"), _gain(model, i, attention.before, "norm1"))
    values = _last_rows(model, i, attention.qkv, qkv, "v", p.kv_dim, p.head_dim, p.heads // p.kv_heads)
    found = [qkv, _site(model, i, attention.o, ("o",), values)]
    if isinstance(mlp, MLP):
        up = _site(model, i, mlp.up, ("gate", "up"), _gain(model, i, mlp.before, "norm2"))
        return [*found, up, _site(model, i, mlp.down, ("down",), _last_rows(model, i, mlp.up, up, "up", p.ff, p.ff))]
    if isinstance(mlp, Experts):
        # Nothing is folded into what experts share with the router, and an expert's own inputs are few.
        return found + list(_experts(model, i, mlp))
    raise UnsupportedModel(f"layer {i} has a {type(mlp).__name__}, which calibration does not know", param="model")


def _site(model: Model, i: int, linear: Linear, parts: tuple[str, ...], source: Gain | RowsOf | None) -> Site:
    """A dense linear; ``parts`` are what the checkpoint calls its rows unless it stores them fused under the linear's own name."""
    if model.weights.knows(linear.name):
        parts = (linear.name,)
    (cell,) = linear.packs
    rows = linear.segments if len(linear.segments) == len(parts) else (cell.weight.shape[0],)
    return Site(f"{i}.{linear.name}", cell, [(model.weights.name(p, i), n) for p, n in zip(parts, rows, strict=True)], source)


def _experts(model: Model, i: int, mlp: Experts) -> Iterator[Site]:
    name = model.weights.name
    for e, (up, down) in enumerate(zip(mlp.gate_up, mlp.down, strict=True)):
        parts = [(name(part, i, expert=e), mlp.ff) for part in ("expert_gate", "expert_up")]
        yield Site(f"{i}.experts.{e}.gate_up", up, parts)
        yield Site(f"{i}.experts.{e}.down", down, [(name("expert_down", i, expert=e), mlp.d)])


def _gain(model: Model, i: int, norm: Norm | None, part: str) -> Gain | None:
    if not isinstance(norm, RMSNorm):
        return None
    return Gain(norm, model.weights.name(part, i), model.weights.tensor(part, i).dtype, model.norm_offset)


def _last_rows(
    model: Model, i: int, linear: Linear, site: Site, part: str, count: int, block: int, repeat: int = 1
) -> RowsOf | None:  # fmt: skip
    """The last ``count`` outputs of a linear as a producer; None if they have a bias that is stored with others'."""
    stop = site.cell.weight.shape[0]
    if linear.bias is None or not model.weights.has(part, i, ".bias"):
        return RowsOf(site.cell, stop - count, stop, block, repeat) if linear.bias is None or model.weights.knows(part) else None
    stored = model.weights.tensor(part, i, ".bias")
    return RowsOf(site.cell, stop - count, stop, block, repeat, linear.bias[-count:], model.weights.name(part, i, ".bias"), stored.dtype)
