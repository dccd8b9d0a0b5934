"""What flows between the stages of a layer: the state, the context made by the walk, and the stages themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from presage.execute.batch import Batch
    from presage.layers.kv.plain import LayerKV
    from presage.layers.moe import Routed
    from presage.layers.ops import Ops


class Ticket(Protocol):
    """Something that may be late (weights, remote attention, a collective). Stages that are done return None."""

    def wait(self) -> Any:
        """Block until it is there."""


class State:
    """All that lives between stages. ``h`` [t, d] float32 is the full residual stream at every stage boundary (no deferred add).

    ``rows`` [t] int32: rows of the step it holds, ascending. ``q`` [t, Hq*D] rotated queries, ``o`` [t, Hq*D] attention output;
    ``moe``: the chosen experts, between ``route`` and ``combine``.
    """

    __slots__ = ("h", "moe", "o", "q", "rows")

    def __init__(self, rows: torch.Tensor, h: torch.Tensor) -> None:
        self.rows, self.h = rows, h
        self.q: torch.Tensor | None = None
        self.o: torch.Tensor | None = None
        self.moe: Routed | None = None

    def select(self, places: torch.Tensor) -> State:
        """The rows at ``places`` (int64 [t]) of this state, as copies; select after select is one select."""
        out = State(self.rows[places], self.h[places])
        out.q = None if self.q is None else self.q[places]
        out.o = None if self.o is None else self.o[places]
        return out


class Workspace:
    """Buffers by name, reused by every layer of every step: a stage's outputs are valid until the same stage runs again."""

    def __init__(self) -> None:
        self._base: dict[tuple[str, int], torch.Tensor] = {}
        self._views: dict[tuple[str, int, int], torch.Tensor] = {}

    def take(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """A [rows, cols] buffer. Views are kept, since slicing a tensor costs more than a small kernel."""
        view = self._views.get((name, rows, cols))
        if view is None:
            view = self._make(name, rows, cols, dtype)
        return view

    def _make(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        base = self._base.get((name, cols))
        if base is None or len(base) < rows:
            self._views = {key: v for key, v in self._views.items() if (key[0], key[2]) != (name, cols)}
            base = self._base[name, cols] = torch.empty(max(rows, 2 * len(base) if base is not None else 16), cols, dtype=dtype)
        view = self._views[name, rows, cols] = base[:rows]
        return view


class LayerContext:
    """What a stage may use beside the state; made by the walk, one per layer and leg."""

    __slots__ = ("batch", "kv", "layer", "ops", "work")

    def __init__(self, layer: int, batch: Batch, kv: LayerKV, ops: Ops, work: Workspace) -> None:
        self.layer, self.batch, self.kv, self.ops, self.work = layer, batch, kv, ops, work


@dataclass(frozen=True, slots=True)
class Stage:
    """A named piece of a layer. ``unit``: the weights it reads (attn, mlp, experts); ``resource``: what it is bound by."""

    name: str
    fn: Callable[[State, LayerContext], Ticket | None]
    unit: str
    resource: str
