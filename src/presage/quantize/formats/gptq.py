"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 4 or 8 bits, groups or one scale an output, with or without act-order.

    qweight int32 [words of K, N], packed down the inputs      qzeros int32 [K / g, words of N], packed along the outputs
    scales  float [K / g, N]                                   g_idx  int32 [K], the group of every input

The first checkpoint format ("gptq") stores zero points minus one; "gptq_v2" stores them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from presage.quantize.canonical import Canonical
from presage.quantize.formats.parts import Parts, unsupported
from presage.quantize.formats.words import PACKABLE, signed, unpack_words, width

METHOD = "gptq"


class GPTQ:
    """Reader of a checkpoint with this ``quantization_config``. Raises UnsupportedModel for other bits and layouts."""

    name = METHOD
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    hidden: tuple[str, ...] = suffixes

    def __init__(self, config: Mapping[str, Any]) -> None:
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            raise unsupported(METHOD, f"checkpoint format {'marlin' if config.get('is_marlin_format') else layout!r}")
        if config.get("bits") not in PACKABLE:
            raise unsupported(METHOD, f"{config.get('bits')} bits")
        if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
            raise unsupported(METHOD, f"packing into {config['pack_dtype']}")
        _refuse_overrides(config)
        self._bits, self._group = int(config["bits"]), int(config.get("group_size") or -1)
        self._symmetric, self._offset = bool(config.get("sym", True)), 1 if layout == "gptq" else 0

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K) of a module's weight, without reading it."""
        words, n = parts.shape("qweight")
        return n, words * 32 // self._bits

    def read(self, parts: Parts) -> Canonical:
        """A module's weight; inputs are sorted by group where act-order has mixed them."""
        n, k = self.shape(parts)
        group = self._group if 0 < self._group < k else k
        count, bits = parts.groups(k, group), self._bits
        codes = unpack_words(parts.get("qweight", (torch.int32,)).T, bits, k)
        scale = parts.scales("scales", (count, n)).T.contiguous()
        stored = unpack_words(parts.get("qzeros", (torch.int32,), (count, width(n, bits))), bits, n).T
        # The mask matters: a stored 15 means 16, which 4 bits read as 0 everywhere.
        zero = (stored + self._offset) & ((1 << bits) - 1)
        order = parts.order("g_idx", k, group)
        if order is not None:
            codes = codes[:, order]
        middle = 1 << bits - 1
        if self._symmetric and bool((zero == middle).all()):
            return Canonical(signed(codes, bits).contiguous(), bits, scale, group, perm=order)
        return Canonical(codes.contiguous(), bits, scale, group, zero.contiguous(), perm=order)


def _refuse_overrides(config: Mapping[str, Any]) -> None:
    """GPTQModel's ``dynamic``: patterns of modules; "-:" ones are left dense, which their tensors show; others change the scheme."""
    for pattern, changes in (config.get("dynamic") or {}).items():
        if str(pattern).startswith("-:") or not isinstance(changes, Mapping):
            continue
        changed = [key for key in ("bits", "group_size", "sym") if changes.get(key, config.get(key)) != config.get(key)]
        if changed:
            raise unsupported(METHOD, f"another {' and '.join(changed)} for modules {pattern!r}")
