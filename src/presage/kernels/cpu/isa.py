"""Which vector instructions kernels may use: one small class per level, chosen from the CPU that numba compiles for.

Only the dot products, the table lookups, `load_f16` and the tile sizes look at this. Setting NUMBA_CPU_NAME (for example
`haswell`) before the start compiles for that CPU instead of the host, with the features LLVM knows it to have and no others;
so AVX2 is tested on AVX-512 hosts. A name that is not in the table counts as BASE: portable LLVM code.
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
    """The instruction set kernels are compiled for. `tile_*`: register tile of a GEMM, rows x columns.

    `bits`: registers of x86's integer instructions (512 or 256; 0: only portable code). `vnni`: byte and word dot products
    in one instruction, of that width. `neon`: NEON is there; `dotprod` and `i8mm` are its two extensions for bytes.
    """

    name: str
    bf16_dot: bool
    vnni: bool
    tile_rows: int
    tile_columns: int
    bits: int = 0
    neon: bool = False
    dotprod: bool = False
    i8mm: bool = False

    @property
    def numerics(self) -> str:
        """How a bf16 dot product rounds: `dot` (vdpbf16ps, denormals flushed) or `fma` (exact products, two fused adds)."""
        return "dot" if self.bf16_dot else "fma"


AVX512_BF16 = ISA("avx512_bf16", True, True, 8, 48, 512)
AVX512_VNNI = ISA("avx512_vnni", False, True, 8, 48, 512)
AVX512 = ISA("avx512", False, False, 8, 48, 512)
# 16 registers of 8 lanes: 4 x 16 holds 8 accumulators, two weights, their halves and a broadcast without spilling.
AVX2_VNNI = ISA("avx2_vnni", False, True, 4, 16, 256)
AVX2 = ISA("avx2", False, False, 4, 16, 256)
BASE = ISA("base", False, False, 2, 16)
# Never run: their machine code is only looked at (tests/tiny/test_simd_isa.py). 32 registers of 4 lanes.
NEON_I8MM = ISA("neon_i8mm", False, False, 4, 16, 0, True, True, True)
NEON_DOT = ISA("neon_dot", False, False, 4, 16, 0, True, True)
NEON = ISA("neon", False, False, 4, 16, 0, True)

_X86 = {
    AVX512_BF16: "znver4 znver5 cooperlake sapphirerapids emeraldrapids graniterapids",
    AVX512_VNNI: "icelake-server icelake-client tigerlake rocketlake cascadelake",
    AVX512: "skylake-avx512 x86-64-v4",
    AVX2_VNNI: "alderlake raptorlake meteorlake arrowlake sierraforest",
    AVX2: "haswell broadwell skylake znver1 znver2 znver3 x86-64-v3",
}
_ARM = {
    NEON_I8MM: "neoverse-v1 neoverse-v2 neoverse-n2 apple-m2 apple-m3 apple-m4",
    NEON_DOT: "neoverse-n1 cortex-a76 apple-m1",
    NEON: "cortex-a72",
}
_BY_CPU = {name: isa for isa, names in (_X86 | _ARM).items() for name in names.split()}


def of_features(features: dict[str, bool], arm: bool) -> ISA:
    """The level that a CPU with these features (LLVM's names) has. `arm`: it is an aarch64."""
    if arm:
        return NEON_I8MM if features.get("i8mm") else NEON_DOT if features.get("dotprod") else NEON
    if all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq")):
        if features.get("avx512bf16") and features.get("avx512vnni"):
            return AVX512_BF16
        return AVX512_VNNI if features.get("avx512vnni") else AVX512
    if all(features.get(name) for name in ("avx2", "fma", "f16c")):
        return AVX2_VNNI if features.get("avxvnni") else AVX2
    return BASE


@lru_cache(maxsize=1)
def current_isa() -> ISA:
    """The instruction set numba compiles for in this process: NUMBA_CPU_NAME if set (unknown names count as BASE), else the host's."""
    if config.CPU_NAME:
        return _BY_CPU.get(config.CPU_NAME, BASE)
    return of_features(dict(binding.get_host_cpu_features()), binding.get_process_triple().startswith(("aarch64", "arm64")))


def _drop_features_of_host() -> None:
    """numba adds the host's features to a CPU named by NUMBA_CPU_NAME, so `haswell` would still get AVX-512 code; here it does not."""
    if config.CPU_NAME and config.CPU_FEATURES is None:
        # For a name that LLVM does not know it assumes nothing at all, not even 64-bit registers.
        unknown = config.CPU_NAME not in _BY_CPU and binding.get_process_triple().startswith("x86_64")
        config.CPU_FEATURES = "+64bit,+x87,+cx8,+fxsr,+sse2" if unknown else ""


_drop_features_of_host()  # when imported: before numba compiles the first kernel, which settles its target
