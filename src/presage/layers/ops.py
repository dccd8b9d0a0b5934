"""The operations that layers are written in: one protocol, two families behind it (CPU kernels, plain-torch twins).

What belongs to a layer (a norm's weight, a cache's address) is bound once, when the model or its KV arrays are made; a step then calls
what was bound. ``dtype`` is the type of weights, activations and keys; every operation accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from presage.quantize.canonical import Canonical
from presage.quantize.planned import Planned

if TYPE_CHECKING:
    from presage.execute.batch import Batch, Table
    from presage.kernels.cpu.pack_store import PackStore
    from presage.kernels.cpu.team import Team

KERNEL_BLOCK = 32
"""Tokens of a block as kernels see it."""

Maybe = torch.Tensor | None
Weight = torch.Tensor | Canonical | Planned
"""A matrix [N, K] as a checkpoint gives it: dense, quantised, or dense and to be quantised."""
Arrays = Sequence[tuple[torch.Tensor, torch.Tensor]]
BoundNorm = Callable[[torch.Tensor, torch.Tensor], Any]
BoundWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]
BoundAttention = Callable[[torch.Tensor, Any, torch.Tensor], Any]


class Copies(Protocol):
    """Copies in every layer of a group, pair after pair."""

    def copy_blocks(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Whole kernel blocks, int64 ids."""

    def move_slots(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Single tokens, int64 slots."""


class Ops(Protocol):
    """A kernel family. ``kind`` names it; ``threads`` is the size of its team; ``numerics`` names what decides its bits."""

    kind: str
    numerics: str
    threads: int
    dtype: torch.dtype

    @property
    def team(self) -> Team | None:
        """The threads that share the work; None: the caller's only."""

    def pack(self, weight: Weight) -> Any:
        """A weight [N, K] in the family's own order."""

    def pack_gate_up(self, gate: Weight, up: Weight) -> Any:
        """Two weights [N, K] of a gated activation."""

    def pack_experts(self, packs: list[Any]) -> Any:
        """Packed weights of equal shape, for one grouped call."""

    def linear(
        self, x: torch.Tensor, packed: Any, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float, norm: BoundNorm | None
    ) -> None:
        """out = epilogue(norm(x) @ W.T); ``residual`` may only be ``out`` itself. Quantised weights quantise rows of x, one scale each."""

    def grouped_linear(self, x: torch.Tensor, experts: Any, offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        """Rows offsets[e] .. offsets[e+1] of x through expert e."""

    def moe_combine(self, parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> None:
        """h[r] += sum over ranks j, ascending, of weight[r, j] * parts[inverse[r, j]]."""

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """out [t, d] float32 = table[ids] * scale."""

    def norm(self, weight: torch.Tensor, bias: Maybe, eps: float, center: bool) -> BoundNorm:
        """RMS norm (``center``: layer norm): call(x, out)."""

    def rope_write(
        self, keys: torch.Tensor, values: torch.Tensor, cos_sin: Maybe, q_norm: Maybe, k_norm: Maybe, eps: float
    ) -> BoundWrite:
        """q and k norms, rotary and cache write: call(qkv, positions, slots, q_out)."""

    def attention(self, keys: torch.Tensor, values: torch.Tensor, heads: int, scale: float, window: int, softcap: float) -> BoundAttention:
        """Paged attention: call(q, views, out)."""

    def views(self, table: Table, batch: Batch) -> Any:
        """What attention reads of a step, bound once per KV group."""

    def copies(self, arrays: Arrays) -> Copies:
        """Copies inside the caches of all layers of a group."""


def build_ops(kernels: Literal["auto", "cpu", "reference"], dtype: torch.dtype, threads: int, store: PackStore | None = None) -> Ops:
    """The family named by ``ExecutorConfig.kernels`` (``auto``: the CPU kernels) with a team of ``threads``.

    ``store``: where weights that are quantised while they load are kept for the next start."""
    # Imported here: the twins must stay usable where numba has no target for the machine.
    if kernels == "reference":
        from presage.layers.ops_reference import ReferenceOps

        return ReferenceOps(dtype)
    from presage.layers.ops_cpu import CpuOps

    return CpuOps(dtype, threads, store)
