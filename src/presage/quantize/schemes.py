"""Quantisation schemes by name: how many bits weights and activations get, and how they are grouped.

``w8a8``: int8 weights, one scale an output; int8 activations, one scale a row. ``w4a8``: 4-bit weights in groups of 128 inputs, int8
activations. ``w4a16``: the same weights, activations stay wide. ``bf16x12``: bf16 weights without loss in 12 and a bit. A suffix ``-g64``
sets the group; ``-z`` adds zero points; ``-h4`` quantises the LM head to 4 bits as well (it has 8 otherwise).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from presage.core.errors import ConfigError

KNOWN = ("w8a8", "w4a8", "w4a16", "w8a16", "bf16x12")
_NAME = re.compile(r"(w8a8|w4a8|w4a16|w8a16|bf16x12)((?:-(?:g\d+|z|h4))*)")


@dataclass(frozen=True, slots=True)
class Scheme:
    """``weight_bits`` 16 packs bf16 without loss. ``group_size`` 0 is one scale an output. ``head``: the LM head's scheme by name."""

    name: str
    weight_bits: int
    group_size: int
    symmetric: bool
    activation_bits: int
    head: str

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a weight [n, k], near enough: codes and a 2-byte scale per group; 12.3 bits where nothing is lost."""
        if self.weight_bits == 16:
            return n * k * 123 // 80
        return n * k * self.weight_bits // 8 + 2 * n * (-(-k // self.group_size) if self.group_size else 2)


def parse_scheme(name: str) -> Scheme:
    """The scheme called ``name``. Raises ConfigError naming those there are."""
    found = _NAME.fullmatch(name)
    if not found:
        known = ", ".join(KNOWN)
        raise ConfigError(f"unknown quantization {name!r}; known: {known}, with -g64, -z or -h4 after 4-bit ones", param="quantization")
    base, flags = found[1], [f for f in found[2].split("-") if f]
    if base == "bf16x12":
        return Scheme(name, 16, 0, True, 16, base)
    weights, activations = (int(bits) for bits in base[1:].split("a"))
    group = next((int(f[1:]) for f in flags if f[0] == "g"), 128 if weights == 4 else 0)
    if group % 32 or (weights == 8 and flags):
        raise ConfigError(f"quantization {name!r}: groups are multiples of 32 inputs, and 8-bit weights take no suffix", param="quantization")
    head = f"w{4 if 'h4' in flags else 8}a{activations}"
    return Scheme(name, weights, group, "z" not in flags, activations, head)
