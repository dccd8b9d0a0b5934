"""Plain-torch twin of rotary and cache write. The rotation is differentiable; the write is not."""

from __future__ import annotations

import torch

from presage.kernels.reference.kv_copy import heads_of, scatter_kv
from presage.kernels.reference.norm import rmsnorm


def cos_sin_table(
    max_pos: int, rot_dim: int, base: float = 10000.0, inv_freq: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """f32 [max_pos, rot_dim]: rot_dim/2 cosines, then as many sines. ``inv_freq`` [rot_dim/2] replaces the usual base ** (-2i/rot_dim);
    ``scale`` multiplies both (YaRN's attention factor). Angles are made in float64: f32 loses digits beyond 2^16 positions."""
    if inv_freq is None:
        inv_freq = base ** (-torch.arange(0, rot_dim, 2, dtype=torch.float64) / rot_dim)
    angles = torch.arange(max_pos, dtype=torch.float64)[:, None] * inv_freq.double()[None]
    return (torch.cat([angles.cos(), angles.sin()], -1) * scale).float()


def rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [t, H, D] turned by ``angles`` [t, rot_dim] (cosines, sines) in its first rot_dim dimensions."""
    rot = angles.shape[-1]
    cos, sin = angles[:, None, : rot // 2], angles[:, None, rot // 2 :]
    turned, rest = x[..., :rot], x[..., rot:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., : rot // 2], turned[..., rot // 2 :])
    pair = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([joined, rest], -1)


def rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    q_out: torch.Tensor | None,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slots: torch.Tensor | None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    interleaved: bool = False,
    dim: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of the CPU kernel; also returns rotated q [t, Hq, D], rotated k and v [t, Hkv, D] before rounding to the cache's type."""
    kv_heads, dim = (0, dim) if v_cache is None else heads_of(v_cache)
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = (x.unflatten(1, (-1, dim)) for x in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
    q, k = _normed(q, q_norm, eps, plus_one), _normed(k, k_norm, eps, plus_one)
    if cos_sin is not None:
        angles = cos_sin[positions.long()].to(qkv.dtype)
        q, k = rotate(q, angles, interleaved), rotate(k, angles, interleaved)
    if q_out is not None:
        q_out.copy_(q.detach())
    if k_cache is not None and v_cache is not None and slots is not None:
        scatter_kv(k_cache, v_cache, slots, k.detach(), v.detach())
    return q, k, v


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float, plus_one: bool) -> torch.Tensor:
    if weight is None:
        return x
    if weight.numel() == x.shape[-1]:
        return rmsnorm(x, weight, eps, plus_one=plus_one)
    return rmsnorm(x.flatten(1), weight, eps, plus_one=plus_one).view_as(x)
