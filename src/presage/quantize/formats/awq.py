"""AWQ checkpoints (AutoAWQ), version ``gemm``: 4 bits, zero points, packed along the outputs in an interleaved order.

    qweight int32 [K, N / 8]      qzeros int32 [K / g, N / 8]      scales float [K / g, N]

Nibble i of a word holds output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from presage.quantize.canonical import Canonical
from presage.quantize.formats.parts import Parts, unsupported

METHOD = "awq"
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word the output 8 c + j is."""


class AWQ:
    """Reader of a checkpoint with this ``quantization_config``. Raises UnsupportedModel for other bits and versions."""

    name = METHOD
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")
    hidden: tuple[str, ...] = suffixes

    def __init__(self, config: Mapping[str, Any]) -> None:
        bits, version = config.get("bits", config.get("w_bit")), str(config.get("version") or "gemm").lower()
        if bits != 4:
            raise unsupported(METHOD, f"{bits} bits")
        if version != "gemm":
            raise unsupported(METHOD, f"version {version!r}")
        self._group = int(config.get("group_size", config.get("q_group_size")) or -1)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K) of a module's weight, without reading it."""
        k, words = parts.shape("qweight")
        return words * 8, k

    def read(self, parts: Parts) -> Canonical:
        """A module's weight."""
        n, k = self.shape(parts)
        group = self._group if 0 < self._group < k else k
        count = parts.groups(k, group)
        codes = _by_output(parts.get("qweight", (torch.int32,)), n)
        zero = _by_output(parts.get("qzeros", (torch.int32,), (count, n // 8)), n)
        return Canonical(codes, 4, parts.scales("scales", (count, n)).T.contiguous(), group, zero)


def _by_output(words: torch.Tensor, n: int) -> torch.Tensor:
    """int32 [rows, N / 8] -> uint8 [N, rows]."""
    across = words.T.contiguous()
    out = torch.empty(n // 8, 8, words.shape[0], dtype=torch.uint8)
    for output, nibble in enumerate(NIBBLE_OF_OUTPUT):
        out[:, output] = (across >> 4 * nibble) & 15
    return out.view(n, -1)
