"""The walk over layers: legs between layers, compiled from the plan's layer ranges. The only loop over layers in the code base.

An ordinary step is one leg with all rows. With ranges (layered prefill, arXiv 2510.08055), rows join at their first layer (from the
embedding, or from the bank) and leave at their last (into the bank, or as output rows); a leg is a maximal run of layers in which the
set of rows does not change. A row's bits do not depend on the others, so a prompt run in layer ranges equals one run whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from presage.core.plan import StepPlan
from presage.core.types import Ints, Want
from presage.execute.batch import Batch
from presage.execute.run import Run
from presage.layers.state import LayerContext, Stage, State, Ticket

_TOPK, _HIDDEN = int(Want.TOPK), int(Want.HIDDEN)

Cursor = tuple[int, int]
"""(layer, stage): a place in the stack; (N, 0) is its end."""


@dataclass(frozen=True, slots=True)
class Leg:
    """Layers [start, stop) with the spans that are in it; ``joins`` enter at ``start``, ``leaves`` go at ``stop``."""

    start: int
    stop: int
    spans: Ints
    joins: Ints
    leaves: Ints


def compile_legs(layer0: Ints, layer1: Ints) -> list[Leg]:
    """Legs of a step from its spans' half-open layer ranges; intervals without spans make no leg."""
    edges = np.unique(np.concatenate([layer0, layer1])).tolist()
    legs = []
    for start, stop in pairwise(edges):
        inside = np.flatnonzero((layer0 <= start) & (layer1 > start)).astype(np.int32)
        if len(inside):
            legs.append(Leg(start, stop, inside, inside[layer0[inside] == start], inside[layer1[inside] == stop]))
    return legs


def layers(run: Run, state: State, batch: Batch, start: Cursor, stop: Cursor) -> Iterator[tuple[Stage, Ticket | None]]:
    """Run the stages from one cursor to another, yielding each with its ticket, so that a driver may overlap what is late."""
    first, skip = start
    last, part = stop
    stack = run.model.layers
    for layer in range(first, last + (part > 0)):
        c = LayerContext(layer, batch, run.kv.layers[layer], run.ops, run.work)
        stages = stack[layer].stages
        for stage in stages[skip if layer == first else 0 : part if layer == last else None]:
            yield stage, stage.fn(state, c)


def walk(run: Run, plan: StepPlan, batch: Batch) -> torch.Tensor:
    """Run a step. Returns the residual stream [T, d] float32 after the last layer, valid until the next step; rows of spans that
    stop earlier are in the bank instead, and their rows of the result mean nothing; but spans that propose (TOPK) leave by the head wherever
    they stop (early exit) and are banked only if they are wanted (HIDDEN), to go on later. Raises StepFailed if a banked chunk is missing."""
    n, stop = len(run.model.layers), int(plan.layer1[0])
    if not plan.layer0.any() and bool((plan.layer1 == stop).all()) and (stop == n or bool((plan.want == _TOPK).all())):
        state = State(batch.rows, _embed(run, batch))
        _drive(run, state, batch, 0, stop)
        return state.h
    return _walk_ranges(run, plan, batch, n)


def _drive(run: Run, state: State, batch: Batch, start: int, stop: int) -> None:
    for _, ticket in layers(run, state, batch, (start, 0), (stop, 0)):
        if ticket is not None:
            ticket.wait()


def _embed(run: Run, batch: Batch) -> torch.Tensor:
    h = run.work.take("h", len(batch), run.model.params.d, torch.float32)
    run.model.embed(batch.ids, batch.positions, h)
    return h


def _walk_ranges(run: Run, plan: StepPlan, batch: Batch, n: int) -> torch.Tensor:
    # Rows keep their place in one [T, d] buffer; each leg works on a copy of its rows and puts them back.
    everything = run.work.take("ranges", len(batch), run.model.params.d, torch.float32)
    for leg in compile_legs(plan.layer0, plan.layer1):
        for s in leg.joins.tolist():
            _join(run, plan, batch, s, leg.start, everything)
        rows = torch.cat([torch.arange(int(plan.rows[s]), int(plan.rows[s + 1])) for s in leg.spans.tolist()])
        part = batch.select(rows)
        state = State(part.rows, everything[rows])
        _drive(run, state, part, leg.start, leg.stop)
        everything[rows] = state.h
        for s in leg.leaves.tolist():
            if leg.stop < n and plan.want[s] & (_TOPK | _HIDDEN) != _TOPK:
                run.bank.put(int(plan.slot[s]), int(plan.start[s]), leg.stop, everything[int(plan.rows[s]) : int(plan.rows[s + 1])])
    return everything


def _join(run: Run, plan: StepPlan, batch: Batch, s: int, layer: int, everything: torch.Tensor) -> None:
    a, b = int(plan.rows[s]), int(plan.rows[s + 1])
    if layer:
        everything[a:b] = run.bank.take(int(plan.slot[s]), int(plan.start[s]), layer, b - a)
    else:
        run.model.embed(batch.ids[a:b], batch.positions[a:b], everything[a:b])
