"""compressed-tensors (vLLM's and llm-compressor's format): ``pack-quantized`` and ``int-quantized`` integer weights.

    pack-quantized   weight_packed int32 [N, words of K codes], weight_shape int64 [N, K], weight_scale [N, K / g];
                     asymmetric: weight_zero_point int32 [words of N, K / g], packed down the outputs
    int-quantized    weight int8 [N, K], weight_scale, asymmetric: weight_zero_point int8 like the scale

Codes and zero points are stored with half their range added where they are packed. A scale per output is [N, 1], one for all [1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from presage.core.errors import CheckpointError
from presage.quantize.canonical import Canonical
from presage.quantize.formats.parts import Parts, unsupported
from presage.quantize.formats.targets import targeted
from presage.quantize.formats.words import counted, signed, unpack_words, width

METHOD = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", "int-quantized"


@dataclass(frozen=True, slots=True)
class Group:
    """How the modules of one config group are stored. ``group`` 0 = one scale an output, -1 = one for the whole matrix."""

    format: str
    bits: int
    group: int
    symmetric: bool
    activations: int


class CompressedTensors:
    """Reader of a checkpoint with this ``quantization_config``. Raises UnsupportedModel for schemes that are not integers like above."""

    name = METHOD
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    hidden: tuple[str, ...] = (*suffixes, "weight")

    def __init__(self, config: Mapping[str, Any]) -> None:
        _refuse(config)
        self._ignore = [str(name) for name in config.get("ignore") or ()]
        self._by_target: dict[str, Group] = {}
        for name, entry in (config.get("config_groups") or {}).items():
            if not isinstance(entry, Mapping):
                raise unsupported(METHOD, f"the preset {name!r} in place of a config group")
            group = _group(entry, str(config.get("format")))
            self._by_target.update({str(target): group for target in entry.get("targets") or ()})

    def shape(self, parts: Parts) -> tuple[int, int]:
        """(N, K) of a module's weight, without reading it."""
        if self._of(parts).format == PLAIN:
            n, k = parts.shape("weight")
            return n, k
        n, k = parts.get("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        return int(n), int(k)

    def read(self, parts: Parts) -> Canonical:
        """A module's weight."""
        group = self._of(parts)
        n, k = self.shape(parts)
        size = group.group if group.group > 0 else k
        count = parts.groups(k, size)
        codes = _packed_codes(parts, group.bits, n, k) if group.format == PACKED else _plain_codes(parts, group.bits, n, k)
        # One scale for all is legal for each strategy of a single output, hence both shapes.
        scale = parts.scales("weight_scale", (n, count), *(((1,), (1, 1), ()) if group.group < 0 else ())).expand(n, count)
        zero = _zeros(parts, group, n, count)
        order = parts.order("weight_g_idx", k, size)
        if zero is None:
            codes = signed(codes, group.bits)
        if order is not None:
            codes = codes[:, order]
        return Canonical(codes.contiguous(), group.bits, scale.contiguous(), size, zero, perm=order, activations=group.activations)

    def _of(self, parts: Parts) -> Group:
        target = targeted(parts.module, self._by_target)
        if target is None or targeted(parts.module, self._ignore) is not None:
            raise CheckpointError(f"{parts.raw.path}: {parts.module} has quantised tensors, but quantization_config does not target it")
        return self._by_target[target]


def _packed_codes(parts: Parts, bits: int, n: int, k: int) -> torch.Tensor:
    """Codes counted from 0, uint8 [N, K]."""
    return unpack_words(parts.get("weight_packed", (torch.int32,), (n, width(k, bits))), bits, k)


def _plain_codes(parts: Parts, bits: int, n: int, k: int) -> torch.Tensor:
    codes, half = parts.get("weight", (torch.int8,), (n, k)), 1 << bits - 1
    if bits < 8 and codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise parts.wrong("weight", f"has codes beyond {bits} bits")
    return counted(codes, bits)


def _zeros(parts: Parts, group: Group, n: int, count: int) -> torch.Tensor | None:
    """Zero points counted as the codes are, uint8 [N, groups]; None if all are in the middle of the range."""
    suffix = "weight_zero_point"
    if group.symmetric:
        # Some versions write zero points of symmetric weights too: all of them 0, which are not looked at.
        return None
    if group.format == PACKED and group.group >= 0:
        words = parts.get(suffix, (torch.int32,), (width(n, group.bits), count))
        return unpack_words(words.T, group.bits, n).T.contiguous()
    stored = parts.get(suffix, (torch.int8,), (n, count), *(((1,), (1, 1), ()) if group.group < 0 else ()))
    return counted(stored, group.bits).expand(n, count).contiguous()


def _refuse(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for what concerns the whole checkpoint."""
    sparse = str((config.get("sparsity_config") or {}).get("format", "dense"))
    if sparse != "dense":
        raise unsupported(METHOD, f"sparsity {sparse}")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise unsupported(METHOD, "transforms (transform_config)")
    if config.get("kv_cache_scheme"):
        raise unsupported(METHOD, "a quantised KV cache (kv_cache_scheme)")
    status = config.get("quantization_status") or "compressed"
    if status != "compressed":
        raise unsupported(METHOD, f"quantization_status {status!r}")
    if not config.get("config_groups"):
        raise unsupported(METHOD, "a quantization_config without config_groups")


def _group(entry: Mapping[str, Any], default_format: str) -> Group:
    form, w = str(entry.get("format") or default_format), entry.get("weights")
    if form not in (PACKED, PLAIN):
        raise unsupported(METHOD, f"format {form!r}")
    if not w:
        raise unsupported(METHOD, "a config group without weights")
    if entry.get("output_activations"):
        raise unsupported(METHOD, "quantised outputs (output_activations)")
    bits, kind = w.get("num_bits", 8), str(w.get("type", "int")).lower()
    if kind != "int" or bits not in (4, 8):
        raise unsupported(METHOD, f"weights of {bits}-bit {kind}")
    if w.get("dynamic"):
        raise unsupported(METHOD, "dynamically quantised weights")
    return Group(form, bits, _group_size(w), bool(w.get("symmetric", True)), _activations(entry.get("input_activations")))


def _group_size(weights: Mapping[str, Any]) -> int:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        # What the package infers for configs that leave the strategy out.
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    known = {"tensor": -1, "channel": 0, "group": size}
    if strategy not in known or (strategy == "group" and not (isinstance(size, int) and size > 0)):
        raise unsupported(METHOD, f"weight strategy {strategy!r} with group_size {size}")
    return int(known[strategy] or 0)


def _activations(inputs: Mapping[str, Any] | None) -> int:
    if not inputs:
        return 16
    bits, kind, strategy = inputs.get("num_bits", 8), str(inputs.get("type", "int")).lower(), inputs.get("strategy")
    fits: Iterable[bool] = (
        bits == 8, kind == "int", bool(inputs.get("dynamic")), strategy == "token", bool(inputs.get("symmetric", True)),
    )  # fmt: skip
    if not all(fits):
        how = "dynamic" if inputs.get("dynamic") else "static"
        even = "symmetric" if inputs.get("symmetric", True) else "asymmetric"
        raise unsupported(METHOD, f"{how} {even} {bits}-bit {kind} input activations per {strategy}")
    return 8
