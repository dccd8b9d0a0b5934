"""What a device can do at most, from data sheets, and how much of it serving kernels reach.

Peaks and bandwidths: vendors' data sheets (dense, without sparsity). Efficiencies and energy shares: GenZ (arXiv 2406.01698), whose
geometric-mean errors hold only after calibration; ``calibrated`` says on what, so that a report can print it.
"""

from __future__ import annotations

from dataclasses import dataclass

from presage.core.errors import ConfigError

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5}
"""Bytes of an element."""
_SPEED = {"float32": 0.5, "bfloat16": 1.0, "float16": 1.0, "fp8": 2.0, "int8": 2.0, "int4": 2.0, "fp4": 2.0}


@dataclass(frozen=True)
class Hardware:
    """One device. ``tflops``: dense bf16 peak, 1e12 operations/s; ``bandwidth``, ``link``: GB/s (link: one direction); ``memory_gib``: 2^30 B.

    ``compute_eff``, ``memory_eff``, ``link_eff``: share of the peak that is reached. ``launch``: seconds an operator costs at least,
    ``overhead``: seconds of a step outside operators. ``link_alpha``, ``link_start``: seconds per hop and per collective.
    ``static_watts`` = share of ``watts`` drawn when idle; the rest goes to compute, memory and link as they are used.
    """

    name: str
    tflops: float
    bandwidth: float
    memory_gib: float
    watts: float
    link: float = 0.0
    compute_eff: float = 0.7
    memory_eff: float = 0.85
    link_eff: float = 0.8
    launch: float = 2e-6
    overhead: float = 1e-3
    link_alpha: float = 1e-6
    link_start: float = 5e-6
    fast: tuple[str, ...] = ("int8",)
    static: float = 0.3
    calibrated: str = "data sheet"

    @property
    def memory(self) -> float:
        """Bytes of device memory."""
        return self.memory_gib * 2**30

    def peak(self, dtype: str) -> float:
        """Operations per second at the peak of a number format; formats without units of their own run as bf16."""
        speed = _SPEED[dtype]
        return self.tflops * 1e12 * (speed if speed <= 1 or dtype in self.fast else 1.0)


_ALL = ("int8", "fp8", "fp4")
_PCIE = 1e-5
"""Seconds per hop where devices meet over PCIe (AIConfigurator's ``p2p_latency``)."""
HARDWARE: dict[str, Hardware] = {
    h.name: h
    for h in (
        Hardware("v100", 125, 900, 32, 300, 150, fast=()),
        Hardware("t4", 65, 320, 16, 70, fast=("int8",)),
        Hardware("a10g", 70, 600, 24, 150, fast=("int8",)),
        Hardware("l4", 121, 300, 24, 72, fast=("int8", "fp8")),
        Hardware("l40s", 362, 864, 48, 350, 32, fast=("int8", "fp8"), link_alpha=_PCIE),
        Hardware("a100-40", 312, 1555, 40, 400, 300),
        Hardware("a100-80", 312, 2039, 80, 400, 300),
        Hardware("h100", 989, 3350, 80, 700, 450, fast=("int8", "fp8")),
        Hardware("h200", 989, 4800, 141, 700, 450, fast=("int8", "fp8")),
        Hardware("gh200", 989, 4900, 144, 900, 450, fast=("int8", "fp8")),
        Hardware("b200", 2250, 8000, 192, 1000, 900, fast=_ALL),
        Hardware("rtx4090", 165, 1008, 24, 450, fast=("int8", "fp8")),
        Hardware("rtxpro6000", 503, 1597, 95.6, 600, 64, fast=_ALL, link_alpha=_PCIE),
        Hardware("mi300x", 1307, 5300, 192, 750, 448, fast=("int8", "fp8")),
        Hardware("gaudi3", 1835, 3675, 128, 900, 300, fast=("fp8",)),
        Hardware("tpuv5e", 197, 819, 16, 200, 50, fast=("int8",)),
        Hardware("epyc-zen4-2c", 0.468, 35, 24, 30, fast=("int8",), launch=4e-6, overhead=1.5e-4, calibrated="kernel ceilings of two cores"),
    )
}
"""Devices by name."""


def hardware(name: str) -> Hardware:
    """A device of the table. Raises ConfigError listing the names."""
    if name not in HARDWARE:
        raise ConfigError(f"unknown hardware {name!r}; known: {', '.join(sorted(HARDWARE))}", param="hardware")
    return HARDWARE[name]
