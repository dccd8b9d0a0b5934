"""How a weight format lies in memory, as numbers: what packing, the matrix product and its wrapper must agree on.

A format's name says everything that decides its kernel: ``bf16``, ``f32``, ``bf16x12`` (bf16 without loss in 12 and a bit), ``w8`` (int8, one
scale an output), and grouped integers ``w4g128s-bf16``: bits, inputs per scale, ``s`` symmetric, ``z`` with zero points or ``m`` with
minima to subtract, type of the scales (bf16, f16, f32); ``-wide`` at the end keeps rows in bf16, the others have them quantised to int8.

Every format is made of planes of 16 outputs; a plane is a run of *units* along K, each a multiple of 64 bytes, so one stream of whole
cache lines is read. A grouped unit is a head (scales, then zero points, of as many groups as fill lines) and the codes of these groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from presage.core.errors import ConfigError
from presage.kernels.cpu.isa import current_isa

LINE = 64
SCALE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
_GROUPED = re.compile(r"w(4|8)g(\d+)(s|z|m)-(bf16|f16|f32)(-wide)?")
X12_INPUTS = 128
"""Inputs of a bf16x12 unit: 16 outputs share a table of 16 exponents over them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One format on this machine. ``rows`` x ``columns``: register tile. ``unit_k`` inputs make a unit of ``unit_bytes`` per plane and
    ``x_bytes`` per row. ``operand``: type of a row. Grouped formats: ``group`` inputs a scale, ``groups`` of them a unit, ``head`` bytes
    before the codes: scales, then zero points or minima.
    """

    fmt: str
    rows: int
    columns: int
    unit_k: int
    unit_bytes: int
    x_bytes: int
    operand: str
    bits: int = 0
    group: int = 0
    groups: int = 0
    head: int = 0
    zero: bool = False
    minima: bool = False
    scale: str = ""

    @property
    def integer(self) -> bool:
        """Are rows quantised to int8?"""
        return self.operand == "i8"

    @property
    def filled(self) -> bool:
        """Is the last unit of K filled up with zeros, so that rows must be as well?"""
        return self.unit_k > 2

    @property
    def vectors(self) -> int:
        """Planes of a block."""
        return self.columns // 16

    @property
    def ahead(self) -> int:
        """Bytes a lone row tile looks ahead in each plane: 6 KB over all planes are best (measured on Zen 4, 2 to 16 KB)."""
        return 6144 // self.vectors // LINE * LINE

    @property
    def code_bytes(self) -> int:
        """Bytes of one plane's codes of a group."""
        return self.group * self.bits * 2

    @property
    def words(self) -> int:
        """What tiles get as `words`: 64-byte lines of a group's codes, or eights of inputs of a bf16x12 unit."""
        return X12_INPUTS // 8 if self.fmt == "bf16x12" else self.code_bytes // LINE

    def units(self, k: int) -> int:
        """Units for K inputs: the last one is filled up, but for bf16, whose odd input is treated apart."""
        return -(-k // self.unit_k) if self.filled else k // self.unit_k

    @property
    def numerics(self) -> str:
        """What decides a result's bits."""
        if self.integer:
            return f"{self.fmt}:int8"
        if self.group:
            return f"{self.fmt}:{current_isa().numerics}"
        # bf16x12 gives the bits of bf16.
        return f"bf16:{current_isa().numerics}" if self.operand == "bf16" else "f32:fma"


@lru_cache(maxsize=256)
def layout(fmt: str) -> Layout:
    """The layout of a format's name. Raises ConfigError for an unknown one."""
    isa = current_isa()
    if fmt in ("bf16", "f32"):
        return Layout(fmt, isa.tile_rows, isa.tile_columns, 2 if fmt == "bf16" else 1, LINE, 4, fmt)
    if fmt == "w8":
        return Layout(fmt, isa.tile_rows, isa.tile_columns, 4, LINE, 4, "i8", 8)
    # Looking values up takes registers of its own.
    narrow = 32 if isa.tile_columns > 16 else 16
    if fmt == "bf16x12":
        return Layout(fmt, isa.tile_rows, narrow, X12_INPUTS, LINE + X12_INPUTS * 24, 2 * X12_INPUTS, "bf16", 12)
    found = _GROUPED.fullmatch(fmt)
    if not found or (found[5] and (found[1] == "8" or found[3] == "m")):
        raise ConfigError(f"unknown weight format {fmt!r}; known: bf16, bf16x12, f32, w8, w4gNs-bf16 and the like", param="fmt")
    bits, group, zero, scale = int(found[1]), int(found[2]), found[3] == "z", found[4]
    if group % (32 if bits == 4 else 16) or not group:
        raise ConfigError(f"weight format {fmt!r}: groups must be multiples of 32 inputs (8 bits: of 16)", param="fmt")
    scale_line, minima = 16 * SCALE_BYTES[scale], found[3] == "m"
    groups = 4 if zero else LINE // scale_line
    head = groups * (scale_line * (2 if minima else 1) + (16 if zero else 0))
    unit_bytes = head + groups * group * bits * 2
    size, operand = (2, "bf16") if found[5] else (1, "i8")
    columns, unit_k = narrow if found[5] else isa.tile_columns, group * groups
    # Codes, both their halves and 24 sums are more than 32 registers: 8 x 48 spills (450 Gop/s where 4 x 48 does 760).
    rows = isa.tile_rows // 2 if bits == 4 and columns > narrow else isa.tile_rows
    return Layout(
        fmt, rows, columns, unit_k, unit_bytes, size * unit_k, operand, bits, group, groups, head, zero, minima, scale
    )
