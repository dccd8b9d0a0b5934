"""Memory for what every step streams, in huge pages: with pages of 4 KB a core reads a tenth slower (misses of the TLB, and the hardware
prefetcher stops at page borders)."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from presage.kernels.cpu.pack import PackedLinear

HUGE = 2 << 20
SLAB = 64 << 20
"""Bytes reserved at once; what is never touched costs nothing."""
LINE = 64


class Arena:
    """Hands out memory from slabs of huge pages where the system grants them, of ordinary pages elsewhere. A slab lives as long as any
    tensor in it; nothing is handed out twice."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Zeros, uint8 [nbytes], 64-byte aligned."""
        if self._used + nbytes > len(self._slab):
            self._slab, self._used = slab(max(nbytes, SLAB)), 0
        out = self._slab[self._used : self._used + nbytes]
        self._used += -(-nbytes // LINE) * LINE
        return out

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor."""
        raw = tensor.reshape(-1).view(torch.uint8)
        return self.take(len(raw)).copy_(raw).view(tensor.dtype).view(tensor.shape)

    def settle(self, packed: PackedLinear) -> PackedLinear:
        """Move a packed weight that no call has used yet here."""
        packed.data = self.copy(packed.data)
        packed.address = packed.data.data_ptr()
        return packed


def slab(nbytes: int) -> torch.Tensor:
    """Zeros, uint8 [>= nbytes], from a huge page's border on."""
    size = -(-nbytes // HUGE) * HUGE
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them: ordinary pages then
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size]
