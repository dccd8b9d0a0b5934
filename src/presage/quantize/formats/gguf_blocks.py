"""GGUF's blocks (ggml-org/llama.cpp) taken apart into codes and scales. Other types than these have no `Canonical` form here.

    Q4_0   32 weights: f16 d, 16 bytes                                      w = d (q - 8)
    Q4_1   32: f16 d, f16 m, 16 bytes                                       w = d q + m
    Q8_0   32: f16 d, 32 int8                                               w = d q
    Q4_K   256: f16 d, f16 dmin, 12 bytes of 6-bit sc and m, 128 bytes      w = d sc q - dmin m, sc and m per 32
    Q6_K   256: 128 bytes low, 64 high, 16 int8 sc, f16 d                   w = d sc (q - 32), sc per 16
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from presage.quantize.canonical import Canonical

Split = Callable[[torch.Tensor], Canonical]


def from_gguf(kind: str, data: np.ndarray) -> Canonical | None:
    """Rows of blocks, uint8 [N, bytes of a row], as a weight; None if ``kind`` (Q4_K ...) is none of the types above."""
    if kind not in _SPLIT:
        return None
    size, split = _SPLIT[kind]
    rows = torch.from_numpy(np.ascontiguousarray(data))
    return split(rows.view(rows.shape[0], -1, size))


def readable(kind: str) -> bool:
    """Does ``from_gguf`` know the type?"""
    return kind in _SPLIT


def _f16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The f16 number at byte ``at`` of every block, [N, blocks]."""
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16)[:, :, 0]


def _rows(parts: torch.Tensor) -> torch.Tensor:
    """[N, blocks, ...] -> [N, K]."""
    return parts.reshape(parts.shape[0], -1).contiguous()


def _halves(data: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 2, n]: all low nibbles, then all high ones."""
    return torch.stack((data & 15, data >> 4), -2)


def _q4_0(b: torch.Tensor) -> Canonical:
    codes = _rows(_halves(b[:, :, 2:]))
    return Canonical((codes.view(torch.int8) - 8), 4, _f16(b, 0), 32, activations=8)


def _q4_1(b: torch.Tensor) -> Canonical:
    codes, low = _rows(_halves(b[:, :, 4:])), -_f16(b, 2)
    # The minimum is a float of its own: one second-level factor of 1 per block carries it.
    return Canonical(codes, 4, _f16(b, 0), 32, sub_group=32, low=torch.ones_like(low, dtype=torch.uint8), low_scale=low, activations=8)


def _q8_0(b: torch.Tensor) -> Canonical:
    return Canonical(_rows(b[:, :, 2:]).view(torch.int8), 8, _f16(b, 0), 32, activations=8)


def _q4_k(b: torch.Tensor) -> Canonical:
    first, second, third = b[:, :, 4:8], b[:, :, 8:12], b[:, :, 12:16]
    sub = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), 2)
    low = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), 2)
    codes = _halves(b[:, :, 16:].unflatten(2, (4, 32)))
    return Canonical(_rows(codes), 4, _f16(b, 0), 256, sub=_rows(sub), sub_group=32, low=_rows(low), low_scale=_f16(b, 2), activations=8)


def _q6_k(b: torch.Tensor) -> Canonical:
    # Each half of 128 weights: 64 bytes of low nibbles, 32 bytes that hold the upper two bits of its four runs of 32.
    low = _halves(b[:, :, :128].unflatten(2, (2, 64))).unflatten(4, (2, 32)).flatten(3, 4)
    high = b[:, :, 128:192].unflatten(2, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = _rows(low | high << 4)
    scale = b[:, :, 192:208].contiguous().view(torch.int8)
    return Canonical(codes.view(torch.int8) - 32, 6, _f16(b, 208), 256, sub=_rows(scale), sub_group=16, activations=8)


_SPLIT: dict[str, tuple[int, Split]] = {
    "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q8_0": (34, _q8_0), "Q4_K": (144, _q4_k), "Q6_K": (210, _q6_k),
}  # fmt: skip
