"""A kernel family under the clock: every operation of another family, timed by name and shape. Calls cost half a microsecond more."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from presage.layers.ops import Arrays, BoundAttention, BoundNorm, BoundWrite, Copies, Maybe, Ops


class TimedNorm:
    """A bound norm that is timed where it is called by itself; ``inner`` goes into the linear layers that fuse it."""

    def __init__(self, inner: BoundNorm, call: BoundNorm) -> None:
        self.inner, self._call = inner, call

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> Any:
        """Norm rows x [t, d] into ``out``."""
        return self._call(x, out)


class TimedOps:
    """Implements ``layers.ops.Ops`` by handing every call to ``inner``. ``seconds``: wall time of each call since the last ``take``, by name."""

    def __init__(self, inner: Ops) -> None:
        self.inner, self.kind, self.numerics = inner, inner.kind, inner.numerics
        self.threads, self.team, self.dtype = inner.threads, inner.team, inner.dtype
        self.pack, self.pack_gate_up, self.pack_experts = inner.pack, inner.pack_gate_up, inner.pack_experts
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._embedding, self._combine = self._timed("embedding", inner.embedding), self._timed("moe_combine", inner.moe_combine)
        self.views = self._timed("views", inner.views)

    def take(self) -> dict[str, list[float]]:
        """The times so far; they start anew."""
        found = dict(self.seconds)
        self.seconds = defaultdict(list)
        return found

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            result = call(*args)
            self.seconds[name].append(time.perf_counter() - began)
            return result

        return run

    def linear(
        self, x: torch.Tensor, packed: Any, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float, norm: BoundNorm | None
    ) -> None:
        """Timed by shape and by what is fused into it."""
        bare = norm.inner if isinstance(norm, TimedNorm) else norm
        began = time.perf_counter()
        self.inner.linear(x, packed, out, bias, residual, act, softcap, bare)
        fused = "".join((" norm" if norm is not None else "", f" {act}" if act else "", " add" if residual is not None else ""))
        self.seconds[f"linear {_shape(packed)}{fused}"].append(time.perf_counter() - began)

    def grouped_linear(self, x: torch.Tensor, experts: Any, offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        """Timed by the experts' shape."""
        began = time.perf_counter()
        self.inner.grouped_linear(x, experts, offsets, out, act)
        packs = getattr(experts, "packs", experts)
        self.seconds[f"grouped_linear {_shape(packs[0])}"].append(time.perf_counter() - began)

    def moe_combine(self, parts: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> None:
        """Timed."""
        self._combine(parts, inverse, weight, h)

    def embedding(self, ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Timed."""
        self._embedding(ids, table, scale, out)

    def norm(self, weight: torch.Tensor, bias: Maybe, eps: float, center: bool) -> BoundNorm:
        """A norm timed where it is not fused."""
        inner = self.inner.norm(weight, bias, eps, center)
        return TimedNorm(inner, self._timed(f"norm {len(weight)}", inner))

    def rope_write(
        self, keys: torch.Tensor, values: torch.Tensor, cos_sin: Maybe, q_norm: Maybe, k_norm: Maybe, eps: float
    ) -> BoundWrite:
        """Timed when called."""
        return self._timed("rope_write", self.inner.rope_write(keys, values, cos_sin, q_norm, k_norm, eps))

    def attention(self, keys: torch.Tensor, values: torch.Tensor, heads: int, scale: float, window: int, softcap: float) -> BoundAttention:
        """Timed when called; windows by themselves."""
        name = f"attention window {window}" if window else "attention"
        return self._timed(name, self.inner.attention(keys, values, heads, scale, window, softcap))

    def copies(self, arrays: Arrays) -> Copies:
        """The inner family's: they run between steps."""
        return self.inner.copies(arrays)


def _shape(packed: Any) -> str:
    """What a packed weight is, in a few characters."""
    if isinstance(packed, torch.Tensor):
        return f"{packed.shape[0]}x{packed.shape[1]}"
    if hasattr(packed, "fmt"):
        return f"{2 * packed.n if packed.gated else packed.n}x{packed.k} {packed.fmt}"
    return "x".join(str(n) for n in packed.shape)
