"""Codes of 4 or 8 bits in int32 words, the first code in the lowest bits: how all safetensors formats pack them.

Words are read as bytes, so the machine must be little endian, as every one is that torch has wheels for.
"""

from __future__ import annotations

import torch

PACKABLE = (4, 8)


def width(count: int, bits: int) -> int:
    """Words that hold ``count`` codes."""
    return -(-count * bits // 32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [rows, width(count)] -> the first ``count`` codes of each row, uint8 [rows, count]."""
    codes = _bytes(words)
    return (nibbles(codes) if bits == 4 else codes)[:, :count]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, count] -> int32 [rows, width(count)], the last word filled up with zeros."""
    rows, count = codes.shape
    full = torch.nn.functional.pad(codes, (0, width(count, bits) * 32 // bits - count))
    if bits == 4:
        pairs = full.view(rows, -1, 2)
        full = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return full.reshape(-1).view(torch.int32).view(rows, -1)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    # Flat first: a transposed column counts as contiguous with strides that a view as bytes refuses.
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def nibbles(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> [..., 2 n]: of each byte the low half, then the high one."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes counted from 0, uint8, as codes around zero, int8 (those already are come back as they are)."""
    # Bytes wrap around, so one subtraction is right for both widths.
    return codes if codes.dtype == torch.int8 else (codes - (1 << bits - 1)).view(torch.int8)


def counted(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of ``signed``."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) + (1 << bits - 1)
