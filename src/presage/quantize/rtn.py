"""Round to nearest: a scheme's codes from the weight alone, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from presage.core.errors import ConfigError
from presage.quantize.canonical import Canonical
from presage.quantize.schemes import Scheme

if TYPE_CHECKING:
    from presage.kernels.cpu.team import Team


def quantize_rtn(weight: torch.Tensor, scheme: Scheme, team: Team | None = None) -> Canonical:
    """A dense weight [N, K] in a scheme's form; 4-bit scales are chosen by least squared error and are exact in bfloat16.

    ``team``: a kernel team that shares the work. Raises ConfigError for a scheme that does not quantise.
    """
    if scheme.weight_bits not in (4, 8):
        raise ConfigError(f"{scheme.name} does not quantise weights", param="quantization")
    wide = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
    k = wide.shape[1]
    if not scheme.symmetric:
        return _asymmetric(wide.float(), min(scheme.group_size, k), scheme)
    from presage.kernels.cpu.quantise import quantise

    group = k if scheme.weight_bits == 8 else scheme.group_size
    codes, scale = quantise(wide, scheme.weight_bits, group, team)
    return Canonical(codes, scheme.weight_bits, scale, min(group, k), activations=scheme.activation_bits)


def _asymmetric(w: torch.Tensor, group: int, scheme: Scheme) -> Canonical:
    n, k = w.shape
    groups = -(-k // group)
    g = torch.nn.functional.pad(w, (0, groups * group - k)).view(n, groups, group)
    low, high = g.amin(2).clamp_max(0), g.amax(2).clamp_min(0)
    scale = ((high - low) / 15).to(torch.bfloat16)
    step = scale.float().clamp_min(1e-30)
    zero = (-low / step).round().clamp(0, 15)
    codes = ((g / step[..., None]).round() + zero[..., None]).clamp(0, 15)
    return Canonical(
        codes.view(n, -1)[:, :k].to(torch.uint8), 4, scale, group, zero=zero.to(torch.uint8), activations=scheme.activation_bits
    )
