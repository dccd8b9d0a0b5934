"""Which vector instructions kernels may use: one small class per level, chosen from the CPU that numba compiles for.

Only a few intrinsics (`dot_bf16`, `dot_u8s8`) and the tile sizes look at this. Setting NUMBA_CPU_NAME (for example
`haswell`) before the start compiles for that CPU instead of the host; so AVX2 is tested on AVX-512 hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import binding
from numba.core import config as numba_config

config: Any = numba_config  # its attributes are set at run time


@dataclass(frozen=True)
class ISA:
    """The instruction set kernels are compiled for. `tile_*`: register tile of a GEMM, rows x columns."""

    name: str
    bf16_dot: bool
    vnni: bool
    tile_rows: int
    tile_columns: int

    @property
    def numerics(self) -> str:
        """How a bf16 dot product rounds: `dot` (vdpbf16ps, denormals flushed) or `fma` (exact products, two fused adds)."""
        return "dot" if self.bf16_dot else "fma"


AVX512_BF16 = ISA("avx512_bf16", True, True, 8, 48)
AVX512_VNNI = ISA("avx512_vnni", False, True, 8, 48)
AVX512 = ISA("avx512", False, False, 8, 48)
# 16 registers of 8 lanes: 4 x 16 holds 8 accumulators, two weights, their halves and a broadcast without spilling.
AVX2 = ISA("avx2", False, False, 4, 16)
BASE = ISA("base", False, False, 2, 16)

_BY_CPU = {
    "znver4": AVX512_BF16,
    "znver5": AVX512_BF16,
    "cooperlake": AVX512_BF16,
    "sapphirerapids": AVX512_BF16,
    "emeraldrapids": AVX512_BF16,
    "graniterapids": AVX512_BF16,
    "icelake-server": AVX512_VNNI,
    "cascadelake": AVX512_VNNI,
    "skylake-avx512": AVX512,
    "haswell": AVX2,
    "broadwell": AVX2,
    "skylake": AVX2,
    "alderlake": AVX2,
    "znver1": AVX2,
    "znver2": AVX2,
    "znver3": AVX2,
    "x86-64-v3": AVX2,
    "x86-64-v4": AVX512,
}


def _of_features(features: dict[str, bool]) -> ISA:
    if all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq")):
        if features.get("avx512bf16") and features.get("avx512vnni"):
            return AVX512_BF16
        return AVX512_VNNI if features.get("avx512vnni") else AVX512
    return AVX2 if features.get("avx2") and features.get("fma") else BASE


@lru_cache(maxsize=1)
def current_isa() -> ISA:
    """The instruction set numba compiles for in this process: NUMBA_CPU_NAME if set (unknown names count as BASE), else the host's."""
    if config.CPU_NAME:
        return _BY_CPU.get(config.CPU_NAME, BASE)
    return _of_features(dict(binding.get_host_cpu_features()))
