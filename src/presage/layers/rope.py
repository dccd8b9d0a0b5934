"""Rotary position tables (Su et al., arXiv 2104.09864) and the rules that stretch them to longer contexts."""

from __future__ import annotations

import math

import torch

from presage.models.params import RopeParams


def inverse_frequencies(rope: RopeParams, max_len: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim / 2] float32 and the factor on cos and sin, for a model that serves ``max_len`` tokens.

    Rules: linear (position interpolation), llama3 (by wavelength), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753).
    """
    base = 1.0 / (rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim))
    if rope.type == "linear":
        return base / rope.get("factor"), 1.0
    if rope.type == "llama3":
        return _llama3(rope, base), 1.0
    if rope.type == "yarn":
        return _yarn(rope)
    if rope.type == "longrope":
        return _longrope(rope, max_len)
    return base, 1.0


def _llama3(rope: RopeParams, base: torch.Tensor) -> torch.Tensor:
    factor, low, high = rope.get("factor"), rope.get("low_freq_factor"), rope.get("high_freq_factor")
    wavelength = 2 * math.pi / base
    scaled = torch.where(wavelength > rope.trained / low, base / factor, base)
    smooth = (rope.trained / wavelength - low) / (high - low)
    between = (wavelength <= rope.trained / low) & (wavelength >= rope.trained / high)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(rope: RopeParams) -> tuple[torch.Tensor, float]:
    factor = rope.get("factor") or rope.get("max_position_embeddings") / rope.trained

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        one, every = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = mscale(one) / mscale(every) if one and every else mscale()

    def dimension(rotations: float) -> float:
        return rope.dim * math.log(rope.trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    frequency = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    return 1.0 / (factor * frequency) * (1 - keep) + 1.0 / frequency * keep, float(attention)


def _longrope(rope: RopeParams, max_len: int) -> tuple[torch.Tensor, float]:
    # One table per engine: switching tables at a length would change the keys that are already in the cache.
    factors = rope.get("long_factor" if max_len > rope.trained else "short_factor")
    factor = rope.get("factor") or rope.get("max_position_embeddings") / rope.trained
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.trained))
    place = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**place), float(attention)


class Rope:
    """``cos_sin`` [max_len, dim] float32: dim/2 cosines, then as many sines, by position. Halves are turned against halves."""

    def __init__(self, rope: RopeParams, max_len: int) -> None:
        frequency, attention = inverse_frequencies(rope, max_len)
        # float32 angles on purpose: checkpoints were trained with the rounding that this has at long positions.
        angle = torch.arange(max_len, dtype=torch.float32)[:, None] * frequency
        self.cos_sin = torch.empty(max_len, rope.dim)
        half = rope.dim // 2
        self.cos_sin[:, :half], self.cos_sin[:, half:] = angle.cos() * attention, angle.sin() * attention
