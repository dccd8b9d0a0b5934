"""Quantised checkpoints as other tools write them (test helper). GPTQ and AWQ are packed one element at a time from their description.

Deliberately slow and unlike the readers: a mistake in the bit layout would have to be made twice, in two ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from presage.models.loading.checkpoint import Checkpoint
from presage.quantize.canonical import Canonical

AWQ_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Codes:
    """A quantised weight in its plainest form: codes [N, K] and zero points [N, G] counted from 0, scales [N, G], the group of each input."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    g_idx: np.ndarray
    bits: int

    def dense(self) -> torch.Tensor:
        """What they mean, float32 [N, K], one weight after the other."""
        n, k = self.codes.shape
        out = torch.zeros(n, k)
        for i in range(n):
            for j in range(k):
                g = int(self.g_idx[j])
                out[i, j] = float(self.scales[i, g]) * (int(self.codes[i, j]) - int(self.zeros[i, g]))
        return out


def random_codes(n: int, k: int, group: int, bits: int, symmetric: bool = False, shuffled: bool = False, seed: int = 0) -> Codes:
    """Random codes of every value, with f16 scales."""
    rng, count = np.random.default_rng(seed), k // group
    zeros = np.full((n, count), 1 << bits - 1) if symmetric else rng.integers(0, 1 << bits, (n, count))
    g_idx = np.arange(k) // group
    scales = torch.tensor(rng.uniform(0.01, 0.03, (n, count)) * (8 / (1 << bits - 1))).to(torch.float16)
    return Codes(rng.integers(0, 1 << bits, (n, k)), zeros, scales, rng.permutation(g_idx) if shuffled else g_idx, bits)


def quantise(w: torch.Tensor, group: int, bits: int, symmetric: bool = False, shuffled: bool = False) -> Codes:
    """Round to nearest of a dense weight [N, K]."""
    n, k = w.shape
    made = random_codes(n, k, group, bits, symmetric, shuffled, seed=n * k)
    top, members = (1 << bits) - 1, [np.flatnonzero(made.g_idx == g) for g in range(k // group)]
    for g, inputs in enumerate(members):
        part = w[:, inputs].double()
        low, high = (part.amin(1).clamp_max(0), part.amax(1).clamp_min(0))
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).clamp_min(1e-4).to(torch.float16)
        zero = torch.full((n,), float(1 << bits - 1)) if symmetric else (-low / scale).round()
        made.scales[:, g], made.zeros[:, g] = scale, zero.clamp(0, top).int().numpy()
        made.codes[:, inputs] = ((part / scale[:, None]).round() + torch.tensor(made.zeros[:, g])[:, None]).clamp(0, top).int().numpy()
    return made


def gptq_tensors(c: Codes, minus_one: bool = True) -> dict[str, torch.Tensor]:
    """qweight packed down the inputs, qzeros along the outputs; version 1 stores zero points minus one."""
    (n, k), per = c.codes.shape, 32 // c.bits
    qweight = np.zeros((k // per, n), np.uint32)
    for i in range(n):
        for j in range(k):
            qweight[j // per, i] |= np.uint32(int(c.codes[i, j]) << c.bits * (j % per))
    qzeros = np.zeros((c.zeros.shape[1], -(-n // per)), np.uint32)
    for i in range(n):
        for g in range(c.zeros.shape[1]):
            stored = (int(c.zeros[i, g]) - int(minus_one)) % (1 << c.bits)
            qzeros[g, i // per] |= np.uint32(stored << c.bits * (i % per))
    return {
        "qweight": torch.from_numpy(qweight.view(np.int32)), "qzeros": torch.from_numpy(qzeros.view(np.int32)),
        "scales": c.scales.T.contiguous(), "g_idx": torch.tensor(c.g_idx, dtype=torch.int32),
    }  # fmt: skip


def awq_tensors(c: Codes) -> dict[str, torch.Tensor]:
    """The gemm version: both packed along the outputs, nibble i of a word holding output 8 c + AWQ_COLUMN_OF_NIBBLE[i]."""
    n, k = c.codes.shape
    qweight, qzeros = np.zeros((k, n // 8), np.uint32), np.zeros((c.zeros.shape[1], n // 8), np.uint32)
    for word in range(n // 8):
        for nibble, column in enumerate(AWQ_COLUMN_OF_NIBBLE):
            for j in range(k):
                qweight[j, word] |= np.uint32(int(c.codes[8 * word + column, j]) << 4 * nibble)
            for g in range(c.zeros.shape[1]):
                qzeros[g, word] |= np.uint32(int(c.zeros[8 * word + column, g]) << 4 * nibble)
    return {
        "qweight": torch.from_numpy(qweight.view(np.int32)), "qzeros": torch.from_numpy(qzeros.view(np.int32)),
        "scales": c.scales.T.contiguous(),
    }  # fmt: skip


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Which tensors of a folder the field quantises: matrices but embeddings, heads and routers."""
    return tensor.dim() == 2 and not any(part in name for part in ("embed", "lm_head", ".gate.weight"))


def rewrite(
    source: Path, target: Path, config: dict[str, Any], pack: Callable[[torch.Tensor], Iterator[tuple[str, torch.Tensor, torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """Copy a folder with its linears packed. ``pack(weight)`` yields (suffix, tensor, meaning); returns the meaning of every tensor."""
    dense, out = load_file(source / "model.safetensors"), {}
    meaning = dict(dense)
    for name, tensor in dense.items():
        if not is_linear(name, tensor):
            out[name] = tensor
            continue
        for suffix, part, meant in pack(tensor):
            out[name.removesuffix("weight") + suffix] = part.contiguous()
            meaning[name] = meant
    target.mkdir(exist_ok=True)
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})
    base = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(base | {"quantization_config": config}))
    return meaning


FORMS: dict[str, dict[str, Any]] = {
    "w8a8": {"bits": 8, "group": 0, "symmetric": True, "activations": 8},
    "w8a16": {"bits": 8, "group": 0, "symmetric": True, "activations": 16},
    "w8a8 asymmetric": {"bits": 8, "group": 0, "symmetric": False, "activations": 8},
    "w4a8": {"bits": 4, "group": 32, "symmetric": True, "activations": 8},
    "w4a8 asymmetric": {"bits": 4, "group": 32, "symmetric": False, "activations": 8},
    "w4a16": {"bits": 4, "group": 32, "symmetric": True, "activations": 16},
    "w4a16 channel": {"bits": 4, "group": 0, "symmetric": False, "activations": 16},
}


def nearest(w: torch.Tensor, bits: int, group: int, symmetric: bool, activations: int) -> Canonical:
    """Round to nearest, nothing more."""
    (n, k), half = w.shape, 1 << bits - 1
    size = group or k
    blocks = w.float().view(n, -1, size)
    if symmetric:
        scale = (blocks.abs().amax(2) / (half - 1)).bfloat16()
        codes = (blocks / scale.float()[:, :, None]).round().clamp(-half, half - 1).to(torch.int8)
        return Canonical(codes.view(n, k), bits, scale, size, activations=activations)
    low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
    scale = ((high - low) / (2 * half - 1)).bfloat16()
    zero = (-low / scale.float()).round().clamp(0, 2 * half - 1)
    codes = ((blocks / scale.float()[:, :, None]).round() + zero[:, :, None]).clamp(0, 2 * half - 1).to(torch.uint8)
    return Canonical(codes.view(n, k), bits, scale, size, zero.to(torch.uint8), activations=activations)


def linears(source: Checkpoint, **form: Any) -> Iterator[tuple[str, Canonical]]:
    for name in source.names():
        tensor = source.get(name)
        if is_linear(name, tensor):
            yield name, nearest(tensor, **form)


def same(a: Canonical, b: Canonical) -> bool:
    present = (a.zero is None) == (b.zero is None) and (a.zero is None or torch.equal(a.zero, b.zero))
    plain = (a.bits, a.group, a.activations) == (b.bits, b.group, b.activations)
    return plain and present and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


F16_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
"""Where the f16 numbers of a block are."""


def random_blocks(kind: str, rows: int, blocks: int, seed: int, limit: float = 0.1) -> np.ndarray:
    """GGUF blocks, uint8 [rows, bytes]: random but for the f16 numbers, which are within the limit."""
    rng, size = np.random.default_rng(seed), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in F16_AT[kind]:
        numbers = rng.uniform(-limit, limit, (rows, blocks, 1)).astype(np.float16)
        data[:, :, at : at + 2] = numbers.view(np.uint8)
    return data.reshape(rows, -1)


class Tensors:
    """A checkpoint of tensors in memory, as readers see one."""

    path = Path("memory")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str, dtypes: tuple[torch.dtype, ...] | None = None) -> torch.Tensor:
        assert dtypes is None or self.tensors[name].dtype in dtypes, name
        return self.tensors[name]
