"""Plain-torch twins of the linear kernels: differentiable, in any float type, and the definition of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from presage.core.errors import ConfigError
from presage.quantize.canonical import Canonical


def activation(x: torch.Tensor, act: str | None) -> torch.Tensor:
    """The elementwise activation `act` without its `_mul`: None, silu, gelu_tanh or gelu. Raises ConfigError."""
    name = (act or "").removesuffix("_mul")
    if not name:
        return x
    if name == "silu":
        return F.silu(x)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    raise ConfigError(f"unknown activation {act!r}", param="act")


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float32 [t, K], scale [t]): each row's largest magnitude becomes 127, ties round to even. A NaN makes the row's scale NaN."""
    wide = x.float()
    limit = wide.abs().amax(-1)
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    factor = torch.where(limit > 0, torch.full_like(limit, 127.0) / limit, torch.zeros_like(limit))
    return (wide * factor[:, None]).round(), limit / 127.0


def product(x: torch.Tensor, weight: torch.Tensor | Canonical) -> torch.Tensor:
    """x @ weight.T [t, N]; a quantised weight that wants int8 activations gets rows as codes times a scale."""
    if isinstance(weight, Canonical):
        if weight.activations == 8:
            codes, scale = quantise_rows(x)
            return ((codes.double() @ weight.unpack().double().T) * scale[:, None].double()).float()
        return x.float() @ weight.unpack().T
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide) @ weight.to(wide).T


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Canonical,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str | None = None,
    scale_rows: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """epilogue(x @ weight.T) [t, N], computed in float32 (float64 stays).

    x [t, K], weight [N, K] in any float type; with a `_mul` activation weight is gate over up [2 N, K]. Operands as in the kernel;
    the residual [t, N] is added last and is not changed.
    """
    y = product(x, weight)
    if bias is not None:
        y = y + bias
    gated = act is not None and act.endswith("_mul")
    y, up = y.chunk(2, dim=-1) if gated else (y, None)
    if softcap > 0:
        y = softcap * torch.tanh(y / softcap)
    y = activation(y, act)
    if up is not None:
        y = y * up
    if scale_rows is not None:
        y = y * scale_rows[:, None]
    return y if residual is None else residual + y


def grouped_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    offsets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    act: str | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` with weights[e] for the rows offsets[e] .. offsets[e+1] of x [t, K]; bias [E, N], row_scale [t]."""
    borders = offsets.tolist()
    parts = [
        linear(
            x[start:stop],
            weights[e],
            bias=None if bias is None else bias[e],
            act=act,
            scale_rows=None if row_scale is None else row_scale[start:stop],
        )
        for e, (start, stop) in enumerate(pairwise(borders))
    ]
    return torch.cat(parts)
