"""GGUF blocks to Canonical, judged by the gguf package's decoder on random bytes: every bit pattern is a legal block."""

from __future__ import annotations

import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from presage.quantize.formats.gguf_blocks import from_gguf, readable
from tests.tiny.quantised_files import random_blocks

# What their Canonical looks like: bits, group, sub_group, codes.
TYPES = {
    "Q4_0": (4, 32, 0, torch.int8),
    "Q4_1": (4, 32, 32, torch.uint8),
    "Q8_0": (8, 32, 0, torch.int8),
    "Q4_K": (4, 256, 32, torch.uint8),
    "Q6_K": (6, 256, 16, torch.int8),
}


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(TYPES)), rows=st.integers(1, 7), blocks=st.integers(1, 4), seed=st.integers(0, 999))
def test_meaning_equals_the_packages(kind: str, rows: int, blocks: int, seed: int) -> None:
    data = random_blocks(kind, rows, blocks, seed)
    weight = from_gguf(kind, data)
    assert weight is not None
    assert np.array_equal(weight.unpack().numpy(), gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert (weight.bits, weight.group, weight.sub_group, weight.codes.dtype) == TYPES[kind]
    assert weight.activations == 8
    # Codes and scales take what the file takes, but for 6-bit scales in bytes and the factor 1 of Q4_1.
    assert data.nbytes <= weight.nbytes <= data.nbytes * 1.06


def test_known_types_only() -> None:
    assert all(map(readable, TYPES))
    for kind in ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "F16", "BF16"):
        assert not readable(kind)
        assert from_gguf(kind, np.zeros((1, 256), np.uint8)) is None


@pytest.mark.parametrize("kind", TYPES)
def test_rows_keep_their_meaning_when_reordered(kind: str) -> None:
    weight = from_gguf(kind, random_blocks(kind, 6, 2, 0))
    assert weight is not None
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(weight.by_row(lambda part: part[order]).unpack(), weight.unpack()[order])
    assert torch.equal(weight.rows(2, 5).unpack(), weight.unpack()[2:5])
