"""Quantised weights through the matrix product: packing is exact, products equal the twin's, a row's bits are its own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError, UnsupportedModel
from presage.kernels.cpu.layout import layout
from presage.kernels.cpu.linear import Experts, grouped_linear, linear
from presage.kernels.cpu.norm import Norm
from presage.kernels.cpu.pack import PackedLinear, pack
from presage.kernels.cpu.pack_int import integer_format, pack_int, unpack_int
from presage.kernels.cpu.pack_x12 import pack_x12, unpack_x12
from presage.kernels.cpu.team import Team
from presage.kernels.reference import linear as twin
from presage.quantize.canonical import Canonical, fuse
from presage.quantize.rtn import quantize_rtn
from presage.quantize.schemes import parse_scheme

# Format -> (bits, group; 0 = the whole row, zero points, type of scales, bits of activations).
FORMATS: dict[str, tuple[int, int, bool, torch.dtype, int]] = {
    "w8": (8, 0, False, torch.float32, 8),
    "w8g32s-f16": (8, 32, False, torch.float16, 8),
    "w8g64z-f16": (8, 64, True, torch.float16, 8),
    "w4g128s-bf16": (4, 128, False, torch.bfloat16, 8),
    "w4g64z-f32": (4, 64, True, torch.float32, 8),
    "w4g128s-bf16-wide": (4, 128, False, torch.bfloat16, 16),
    "w4g64z-f16-wide": (4, 64, True, torch.float16, 16),
}
NAMES = sorted(FORMATS)


@cache
def team(threads: int = 2) -> Team:
    """One team per size, as in an engine."""
    return Team(threads)


def weight(fmt: str, n: int, k: int, seed: int = 0) -> Canonical:
    """Random codes over their whole range, with a scale that needs the type it is said to have."""
    bits, group, zero, dtype, activations = FORMATS[fmt]
    g = torch.Generator().manual_seed(seed)
    group = group or k
    groups = -(-k // min(group, k))
    scale = (torch.rand(n, groups, generator=g) * 0.1 + 0.01).to(dtype)
    if not zero:
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), generator=g, dtype=torch.int8)
        return Canonical(codes, bits, scale, min(group, k), activations=activations)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (n, groups), generator=g, dtype=torch.uint8)
    return Canonical(codes, bits, scale, min(group, k), zeros, activations=activations)


def rows(t: int, k: int, fmt: str, seed: int = 1) -> torch.Tensor:
    """Activations: bf16, where the format keeps them, so that rounding is not what is measured."""
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16() if fmt.endswith("wide") else x


def apply(x: torch.Tensor, p: PackedLinear, threads: int = 2, **options: object) -> torch.Tensor:
    """`linear` into a fresh f32 output that starts as NaN."""
    out = torch.full((x.shape[0], p.n), float("nan"))
    linear(team(threads), x, p, out, **options)  # type: ignore[arg-type]
    return out


def close(out: torch.Tensor, wanted: torch.Tensor, scale: float = 2e-5) -> bool:
    """Equal within the rounding of f32 sums, relative to the largest value."""
    return bool((out.double() - wanted.double()).abs().max() <= scale * (1 + wanted.double().abs().max()))


@pytest.mark.parametrize("fmt", NAMES)
@pytest.mark.parametrize("shape", [(1, 64), (50, 320), (97, 512), (130, 1100)])
def test_packing_is_exact_and_the_product_is_the_twins(fmt: str, shape: tuple[int, int]) -> None:
    if FORMATS[fmt][1] > shape[1]:
        pytest.skip("a group wider than the row")
    w, x = weight(fmt, *shape), rows(5, shape[1], fmt)
    p = pack_int([w], team())
    if FORMATS[fmt][1] != shape[1]:
        assert p.fmt == fmt
    assert torch.equal(unpack_int(p), w.unpack())
    assert close(apply(x, p), twin.linear(x, w))
    assert p.nbytes >= w.nbytes


@pytest.mark.parametrize("fmt", NAMES)
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows_or_threads(fmt: str) -> None:
    p, x = pack_int([weight(fmt, 100, 320)], team()), rows(300, 320, fmt)
    single = torch.cat([apply(x[r : r + 1], p, 1) for r in range(300)])
    for count in (*range(1, 34), 64, 100, 257, 300):
        assert torch.equal(apply(x[:count], p), single[:count]), count
        assert torch.equal(apply(x[300 - count :], p, 3), single[300 - count :]), count


@pytest.mark.parametrize("fmt", NAMES)
def test_bits_of_a_column_do_not_depend_on_its_neighbours(fmt: str) -> None:
    w, x = weight(fmt, 130, 256), rows(9, 256, fmt)
    assert torch.equal(apply(x, pack_int([w.rows(37, 101)], team())), apply(x, pack_int([w], team()))[:, 37:101])


@pytest.mark.parametrize("fmt", NAMES)
def test_epilogues_and_gated_pairs(fmt: str) -> None:
    gate, up, x = weight(fmt, 61, 256), weight(fmt, 61, 256, 2), rows(11, 256, fmt)
    both, p = fuse([gate, up]), pack_int([gate, up], team())
    assert torch.equal(unpack_int(p), both.unpack())
    bias, scale, start = torch.randn(122), torch.randn(11), torch.randn(11, 61)
    assert close(apply(x, p, act="silu_mul", bias=bias), twin.linear(x, both, act="silu_mul", bias=bias))
    out, one = start.clone(), pack_int([gate], team())
    linear(team(), x, one, out, bias=bias[:61], residual=out, scale_rows=scale, act="gelu_tanh")
    assert close(out, twin.linear(x, gate, bias=bias[:61], residual=start, scale_rows=scale, act="gelu_tanh"))
    assert close(apply(x, one, softcap=3.0), twin.linear(x, gate, softcap=3.0))


@pytest.mark.parametrize("fmt", [*NAMES, "bf16", "bf16x12"])
@pytest.mark.parametrize("center", [False, True])
def test_a_fused_norm_has_the_bits_of_the_norm_kernel(fmt: str, center: bool) -> None:
    h, out = torch.randn(7, 320), torch.empty(7, 320)
    gain, bias = torch.randn(320), torch.randn(320) if center else None
    norm = Norm(team(), gain, 1e-5, plus_one=not center, bias=bias, center=center)
    dense = torch.randn(50, 320)
    p = pack(dense, fmt) if fmt == "bf16" else pack_x12([dense]) if fmt == "bf16x12" else pack_int([weight(fmt, 50, 320)])
    norm(h, out)
    assert torch.equal(apply(h, p, norm=norm), apply(out, p))
    assert torch.equal(apply(h[3:4], p, norm=norm), apply(h, p, norm=norm)[3:4])


@pytest.mark.parametrize("fmt", ["w4g128s-bf16", "w4g64z-f32", "w4g64z-f16-wide"])
def test_inputs_in_another_order(fmt: str) -> None:
    w, x = weight(fmt, 40, 256), rows(6, 256, fmt)
    shuffled = replace(w, perm=torch.randperm(256, generator=torch.Generator().manual_seed(3)))
    p = pack_int([shuffled], team())
    assert torch.equal(unpack_int(p), shuffled.unpack())
    assert close(apply(x, p), twin.linear(x, shuffled))


@pytest.mark.parametrize("fmt", NAMES)
def test_a_bad_row_stays_alone_and_shows(fmt: str) -> None:
    p, x = pack_int([weight(fmt, 50, 256)], team()), rows(10, 256, fmt)
    clean = apply(x, p)
    x[4, 17], x[7, 3] = float("nan"), float("inf")
    out, keep = apply(x, p), [r for r in range(10) if r not in (4, 7)]
    assert torch.equal(out[keep], clean[keep])
    assert out[4].isnan().all() and not out[7].isfinite().any()


def two_level(bits: int, n: int, k: int) -> Canonical:
    """Integer scales under float ones: as Q4_K (minima, parts of 32) for 4 bits, as Q6_K (parts of 16) for 6."""
    g, part = torch.Generator().manual_seed(9), 32 if bits == 4 else 16
    scale, parts = (torch.rand(n, -(-k // 256), generator=g) * 0.01).half(), -(-k // part)
    if bits == 6:
        codes, sub = torch.randint(-32, 32, (n, k), generator=g).to(torch.int8), torch.randint(-128, 128, (n, parts), generator=g).to(torch.int8)
        return Canonical(codes, 6, scale, 256, sub=sub, sub_group=part)
    codes = torch.randint(0, 16, (n, k), generator=g).to(torch.uint8)
    sub, low = (torch.randint(0, 64, (n, parts), generator=g).to(torch.uint8) for _ in range(2))
    return Canonical(codes, 4, scale, 256, sub=sub, sub_group=part, low=low, low_scale=scale * 0.7)


@pytest.mark.parametrize("bits", [4, 6])
def test_two_levels_of_scales(bits: int) -> None:
    for k in (256, 1024):
        w, x = two_level(bits, 70, k), rows(19, k, "")
        p = pack_int([w], team())
        assert torch.equal(unpack_int(p), w.unpack())
        assert close(apply(x, p), twin.linear(x, replace(w, activations=8)))
        assert torch.equal(apply(x[7:8], p, 1), apply(x, p)[7:8])


def test_zero_rows_and_strided_rows() -> None:
    w = weight("w8", 30, 100)
    p, wide = pack_int([w], team()), torch.full((4, 150), float("nan"))
    wide[:, 20:120] = rows(4, 100, "w8")
    wide[2, 20:120] = 0
    out = apply(wide[:, 20:120], p)
    assert torch.equal(out, apply(wide[:, 20:120].contiguous(), p)) and not out[2].any()


def test_experts_have_the_bits_of_their_own_weight() -> None:
    packs = [pack_int([weight("w4g128s-bf16", 40, 256, seed)], team()) for seed in range(3)]
    x, offsets, out = rows(9, 256, ""), torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.empty(9, 40)
    grouped_linear(team(), x, Experts(packs), offsets, out)
    assert torch.equal(out, torch.cat([apply(x[:4], packs[0]), apply(x[4:], packs[2])]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 400), st.integers(0, 99), st.booleans())
def test_bf16x12_is_bf16_bit_for_bit(n: int, k: int, seed: int, wild: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g).bfloat16()
    if wild:  # more than 16 exponents in many units, zeros of both signs, the largest and the smallest numbers
        w = (w.float() * torch.exp2(torch.randint(-60, 60, (n, k), generator=g).float())).bfloat16()
        w[0, 0], w[-1, -1] = -0.0, 3.0e38
    p, x = pack_x12([w], team()), torch.randn(9, k, generator=g).bfloat16()
    assert torch.equal(unpack_x12(p).view(torch.int16), w.view(torch.int16))
    assert torch.equal(apply(x, p), apply(x, pack(w, "bf16")))
    assert p.numerics == pack(w, "bf16").numerics


def test_bf16x12_gated_and_smaller() -> None:
    gate, up, x = torch.randn(90, 512).bfloat16(), torch.randn(90, 512).bfloat16(), torch.randn(10, 512).bfloat16()
    p = pack_x12([gate, up], team())
    assert torch.equal(unpack_x12(p), torch.cat([gate, up]))
    assert close(apply(x, p, act="silu_mul"), twin.linear(x, torch.cat([gate, up]), act="silu_mul"), 1e-4)
    assert pack_x12([torch.randn(960, 512)]).nbytes * 8 / (960 * 512) < 12.6


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a8-g32", "w4a8-z", "w4a16", "w8a16"])
def test_rounding_to_nearest(name: str) -> None:
    scheme, w = parse_scheme(name), torch.randn(64, 512)
    q = quantize_rtn(w, scheme, team())
    error = float(((q.unpack() - w).square().mean() / w.square().mean()).sqrt())
    assert error < (0.012 if scheme.weight_bits == 8 else 0.105)
    assert q.activations == scheme.activation_bits and q.codes.shape == w.shape
    assert torch.equal(quantize_rtn(w.bfloat16(), scheme).unpack(), quantize_rtn(w.bfloat16().float(), scheme).unpack())
    tail = quantize_rtn(torch.randn(5, 75), scheme)
    assert tail.shape == (5, 75) and tail.unpack().isfinite().all()


def test_scales_of_zero_and_refusals() -> None:
    assert not quantize_rtn(torch.zeros(3, 128), parse_scheme("w4a8")).unpack().any()
    assert not quantize_rtn(torch.zeros(3, 128), parse_scheme("w8a8")).unpack().any()
    for name in ("w5a8", "w8a8-g64", "w4a8-g20", "int4", ""):
        with pytest.raises(ConfigError):
            parse_scheme(name)
    for fmt in ("w4g48s-bf16", "w4g100s-bf16", "w3g64s-bf16", "w8g32s-bf16-wide", "bf17"):
        with pytest.raises(ConfigError):
            layout(fmt)
    with pytest.raises(UnsupportedModel):
        integer_format(replace(weight("w8", 4, 64), bits=3))
