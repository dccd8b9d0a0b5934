"""A quantised weight in neutral form: codes and scales as plain tensors, whatever file they came from and whatever kernel will read them.

    w[n, k] = scale[n, k // group] * sub[n, k // sub_group] * (codes[n, k] - zero[n, k // group]) - low_scale[n, k // group] * low[n, k // sub_group]

with absent parts left out (sub = 1, zero = 0, low = 0). That covers per-channel and grouped integers, symmetric or not (compressed-tensors,
GPTQ, AWQ, Q8_0, Q4_0), and integer scales under a float one (QServe, arXiv 2405.04532; GGUF's Q4_K and Q6_K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from presage.core.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Canonical:
    """A weight [N, K] in ``bits`` bits.

    ``codes`` int8 [N, K] if they are signed around zero, uint8 [N, K] if they are counted from 0. ``scale`` float [N, ceil(K / group)];
    ``group`` = K is one scale a row. ``zero`` like ``scale``, uint8 (int8 for signed codes). ``sub`` int8 or uint8 and ``low`` uint8
    [N, ceil(K / sub_group)] are second-level factors; ``low_scale`` like ``scale``, None = ``scale``. ``perm`` int64 [K]: column j
    multiplies input perm[j] (act-order), None = in order. ``activations``: 8 if rows of the input are to be quantised to int8, one scale
    each, 16 if they stay wide. Raises CheckpointError if shapes do not fit each other.
    """

    codes: torch.Tensor
    bits: int
    scale: torch.Tensor
    group: int
    zero: torch.Tensor | None = None
    sub: torch.Tensor | None = None
    sub_group: int = 0
    low: torch.Tensor | None = None
    low_scale: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    activations: int = 16

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.codes.dtype not in (torch.int8, torch.uint8) or not 0 < self.group <= k:
            raise CheckpointError(f"quantised weight: codes are {self.codes.dtype} {tuple(self.codes.shape)}, group {self.group}")
        groups, parts = -(-k // self.group), -(-k // self.sub_group) if self.sub_group else 0
        wanted = {"scale": groups, "zero": groups, "low_scale": groups, "sub": parts, "low": parts}
        for name, count in wanted.items():
            part = getattr(self, name)
            if part is not None and tuple(part.shape) != (n, count):
                raise CheckpointError(f"quantised weight [{n}, {k}]: {name} is {list(part.shape)}, expected {[n, count]}")
        if self.perm is not None and (self.perm.dtype != torch.int64 or tuple(self.perm.shape) != (k,)):
            raise CheckpointError(f"quantised weight [{n}, {k}]: perm is {self.perm.dtype} {list(self.perm.shape)}")

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes at the true number of bits: codes, scales and all."""
        rest = sum(t.nbytes for t in (self.scale, self.zero, self.sub, self.low, self.low_scale) if t is not None)
        return self.codes.numel() * self.bits // 8 + rest

    def unpack(self) -> torch.Tensor:
        """The exact meaning of the codes, float32 [N, K], columns in the input's order."""
        k = self.codes.shape[1]

        def wide(part: torch.Tensor, group: int) -> torch.Tensor:
            return part.float().repeat_interleave(group, 1)[:, :k]

        codes = self.codes.float()
        if self.zero is not None:
            codes = codes - wide(self.zero, self.group)
        factor = wide(self.scale, self.group)
        if self.sub is not None:
            factor = factor * wide(self.sub, self.sub_group)
        w = factor * codes
        if self.low is not None:
            w = w - wide(self.scale if self.low_scale is None else self.low_scale, self.group) * wide(self.low, self.sub_group)
        if self.perm is None:
            return w
        out = torch.empty_like(w)
        out[:, self.perm] = w
        return out

    def rows(self, start: int, stop: int) -> Canonical:
        """Outputs [start, stop) only."""
        return self.by_row(lambda part: part[start:stop])

    def by_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Canonical:
        """One change of the outputs (a cut, an order, rows of zeros) made to codes, scales and all: each is [N, ...]."""
        changed: dict[str, Any] = {n: change(getattr(self, n)) for n in _BY_ROW if getattr(self, n) is not None}
        return replace(self, **changed)

    def chunk(self, parts: int) -> tuple[Canonical, ...]:
        """Equal parts of the outputs, as torch's ``chunk`` (a fused gate and up)."""
        n = self.shape[0] // parts
        return tuple(self.rows(i * n, (i + 1) * n) for i in range(parts))

    def alike(self, other: Canonical) -> bool:
        """May the two be fused into one weight: same form, same input order?"""
        same = (self.bits, self.group, self.sub_group, self.activations, self.codes.dtype, self.shape[1]) == (
            other.bits, other.group, other.sub_group, other.activations, other.codes.dtype, other.shape[1],
        )  # fmt: skip
        present = all((getattr(self, n) is None) == (getattr(other, n) is None) for n in (*_BY_ROW, "perm"))
        return same and present and (self.perm is None or other.perm is None or torch.equal(self.perm, other.perm))


_ROWS = 1024
_BY_ROW = ("codes", "scale", "zero", "sub", "low", "low_scale")


def fuse(parts: Sequence[Canonical]) -> Canonical:
    """Weights over the same input one below the other (q|k|v). Raises CheckpointError unless they are ``alike``."""
    first = parts[0]
    if not all(first.alike(p) for p in parts[1:]):
        raise CheckpointError("weights that are fused (q|k|v, gate|up) are quantised in different ways")
    if len(parts) == 1:
        return first
    # Scales may come in different float types; torch.cat takes the wider one, which keeps every value.
    joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in _BY_ROW if getattr(first, n) is not None}
    return replace(first, **joined)


def dense(weight: torch.Tensor | Canonical, dtype: torch.dtype) -> torch.Tensor:
    """A weight as a contiguous tensor of a type; one that is so already comes back as it is (mapped). Quantised ones are unpacked
    some rows at a time: a vocabulary in float32 would be four times its codes and more."""
    if isinstance(weight, torch.Tensor):
        return weight.to(dtype).contiguous()
    out = torch.empty(weight.shape, dtype=dtype)
    for start in range(0, len(out), _ROWS):
        out[start : start + _ROWS] = weight.rows(start, min(start + _ROWS, len(out))).unpack()
    return out
