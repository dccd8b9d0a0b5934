"""Norms, rotary with cache write, cache copies and elementwise kernels against their twins; tails, strides, skipped writes, equal bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError
from presage.kernels.cpu import activation, kv_copy, norm, rope
from presage.kernels.cpu.attention import cache_shapes
from presage.kernels.cpu.team import Team
from presage.kernels.reference import activation as activation_twin
from presage.kernels.reference import kv_copy as copy_twin
from presage.kernels.reference import norm as norm_twin
from presage.kernels.reference import rope as rope_twin

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
TEAM, SOLO = Team(2), Team(1)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small torch operators wait longer for each other's threads than they compute, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def caches(blocks: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty (zero) K and V caches."""
    keys, values = cache_shapes(blocks, heads, dim, dtype)
    return torch.zeros(keys, dtype=dtype), torch.zeros(values, dtype=dtype)


@pytest.mark.parametrize("width", [*range(1, 66, 4), 16, 32, 64, 100, 576])
def test_norms_equal_their_twins(width: int) -> None:
    """RMS norm, 1 + weight, layer norm with and without bias, bf16 out; every tail."""
    x, w, b = 3 * randn(5, width) + 1, randn(width, seed=1), randn(width, seed=2)
    out = torch.empty(5, width)
    for plus_one in (False, True):
        norm.rmsnorm(TEAM, x, w, 1e-5, out, plus_one)
        torch.testing.assert_close(out, norm_twin.rmsnorm(x, w, 1e-5, plus_one=plus_one), atol=1e-5, rtol=1e-5)
    half = torch.empty(5, width, dtype=BF16)
    norm.rmsnorm(TEAM, x, w, 1e-5, half, True)
    assert torch.equal(half, out.bfloat16())
    for bias in (b, None):
        norm.layernorm(TEAM, x, w, bias, 1e-5, out)
        torch.testing.assert_close(out, norm_twin.layernorm(x, w, bias, 1e-5), atol=3e-5, rtol=1e-5)


def test_norms_read_strided_heads_and_never_the_neighbours() -> None:
    """Heads inside a wider projection are normalised in place; NaN beside them stays beside them."""
    base, w = torch.full((4, 3 * 24 + 8), float("nan")), randn(24, seed=1)
    view = base[:, :72].unflatten(1, (3, 24))
    x = randn(4, 3, 24)
    view.copy_(x)
    norm.rmsnorm(TEAM, view, w, 1e-6, view)
    torch.testing.assert_close(view, norm_twin.rmsnorm(x, w, 1e-6), atol=1e-5, rtol=1e-5)
    assert torch.isnan(base[:, 72:]).all()


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    """Rows of 37 and of 1, teams of 2 and 1."""
    x, w = randn(37, 100), randn(100, seed=1)
    want, out = torch.empty(37, 100), torch.empty(1, 100)
    norm.rmsnorm(TEAM, x, w, 1e-6, want)
    for r in (0, 11, 36):
        norm.rmsnorm(SOLO, x[r : r + 1], w, 1e-6, out)
        assert torch.equal(out[0], want[r])


cases = st.tuples(
    st.sampled_from([(4, 2, 64, 64), (4, 2, 80, 80), (3, 1, 80, 32), (4, 4, 16, 0), (8, 2, 128, 128), (2, 2, 48, 48), (1, 1, 256, 64)]),
    st.sampled_from(["none", "head", "whole"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([F32, BF16, INT8]),
    st.integers(1, 40),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases)
def test_rope_write_equals_its_twin(case: tuple[tuple[int, int, int, int], str, bool, bool, torch.dtype, int]) -> None:
    """Full, partial and no rotary, both pairings, both norms; rows with slot -1 leave the cache alone."""
    (heads, kv_heads, dim, rot), norms, plus_one, interleaved, dtype, rows = case
    qkv = randn(rows, (heads + 2 * kv_heads) * dim)
    positions = torch.randint(0, 300, (rows,), generator=torch.Generator().manual_seed(1)).int()
    slots = torch.randperm(3 * 32, generator=torch.Generator().manual_seed(2))[:rows].clone()
    slots[rows // 2 :: 3] = -1
    table = rope_twin.cos_sin_table(300, rot) if rot else None
    q_norm, k_norm = {"none": (None, None), "head": (randn(dim, seed=3), randn(dim, seed=4))}.get(
        norms, (randn(heads * dim, seed=3), randn(kv_heads * dim, seed=4))
    )
    got, want = caches(3, kv_heads, dim, dtype), caches(3, kv_heads, dim, dtype)
    q = torch.full((rows, heads, dim), float("nan"))
    q_want = q.clone()
    rope.rope_write(TEAM, qkv, positions, table, q, *got, slots, q_norm, k_norm, 1e-6, plus_one, interleaved)
    rope_twin.rope_write(qkv, positions, table, q_want, *want, slots, q_norm, k_norm, 1e-6, plus_one, interleaved)
    torch.testing.assert_close(q, q_want, atol=2e-5, rtol=2e-5)
    # A value on the border of two stored numbers may round to either when the norm's last bit differs.
    everything = torch.arange(96)
    k, v, *scales = copy_twin.gather_stored(*got, everything)
    k_want, v_want, *scales_want = copy_twin.gather_stored(*want, everything)
    atol, rtol = {F32: (2e-5, 2e-5), BF16: (2e-5, 2**-7), INT8: (1, 0)}[dtype]
    torch.testing.assert_close(k.float(), k_want.float(), atol=atol, rtol=rtol)
    assert torch.equal(v, v_want)
    if dtype == INT8:
        torch.testing.assert_close(scales[0], scales_want[0], atol=0, rtol=2e-5)
        assert torch.equal(scales[1], scales_want[1])
    if q_norm is None:
        assert torch.equal(got[0], want[0])


def test_the_rotary_twin_turns_complex_numbers() -> None:
    """Pairs (a, b) become (a + ib) e^(i angle), for halves and for neighbours."""
    x, positions = randn(6, 2, 16).double(), torch.tensor([0, 1, 5, 100, 4000, 70000])
    table = rope_twin.cos_sin_table(70001, 16)[positions].double()
    angles = positions[:, None, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8.0)
    turn = torch.polar(torch.ones_like(angles), angles)
    halves = rope_twin.rotate(x, table)
    z = torch.complex(x[..., :8], x[..., 8:]) * turn
    torch.testing.assert_close(halves, torch.cat([z.real, z.imag], -1), atol=1e-5, rtol=1e-5)
    z = torch.view_as_complex(x.unflatten(-1, (8, 2)).contiguous()) * turn
    torch.testing.assert_close(rope_twin.rotate(x, table, interleaved=True), torch.view_as_real(z).flatten(-2), atol=1e-5, rtol=1e-5)


def test_queries_only_keys_only_and_bf16_queries() -> None:
    """A layer that shares another's cache makes q only; `fill` makes K and V only; q may be bf16."""
    qkv, positions, table = randn(5, 8 * 32), torch.arange(5).int(), rope_twin.cos_sin_table(8, 32)
    full, part, slots = caches(2, 2, 32, BF16), caches(2, 2, 32, BF16), torch.arange(33, 38)
    q, alone, half = (torch.empty(5, 4, 32, dtype=d) for d in (F32, F32, BF16))
    rope.rope_write(TEAM, qkv, positions, table, q, *full, slots)
    rope.rope_write(TEAM, qkv[:, :128], positions, table, alone, None, None, None, dim=32)
    assert torch.equal(q, alone)
    rope.rope_write(TEAM, qkv[:, 128:], positions, table, None, *part, slots)
    assert all(torch.equal(a, b) for a, b in zip(full, part, strict=True))
    rope.rope_write(TEAM, qkv, positions, table, half, *part, slots)
    assert torch.equal(half, q.bfloat16())


def test_rope_rows_are_independent_and_typed_errors() -> None:
    """A NaN row stays one; the same row alone has the same bits; misfits are refused."""
    qkv, positions, table = randn(9, 4 * 48), torch.arange(9).int(), rope_twin.cos_sin_table(9, 48)
    qkv[4] = float("nan")
    w = (randn(96, seed=1), randn(48, seed=2))
    many, one = caches(1, 1, 48, BF16), caches(1, 1, 48, BF16)
    q, single = torch.empty(9, 2, 48), torch.empty(1, 2, 48)
    rope.rope_write(TEAM, qkv, positions, table, q, *many, torch.arange(9), *w)
    rope.rope_write(SOLO, qkv[7:8], positions[7:8], table, single, *one, torch.tensor([7]), *w)
    assert torch.equal(q[7], single[0]) and torch.isnan(q[4]).all() and torch.isfinite(q[[0, 1, 2, 3, 5, 6, 7, 8]]).all()
    assert all(torch.equal(a, b) for a, b in zip(*(copy_twin.gather_kv(*pair, torch.tensor([7])) for pair in (many, one)), strict=True))
    with pytest.raises(ConfigError, match="slots"):
        rope.rope_write(TEAM, qkv, positions, table, q, *many, torch.arange(9).int())
    with pytest.raises(ConfigError, match="positions"):
        rope.rope_write(TEAM, qkv, positions.long(), table, q, *many, torch.arange(9))
    with pytest.raises(ConfigError, match="caches"):
        rope.RopeWrite(TEAM, many[1], many[0], table)


@pytest.mark.parametrize("dtype", [BF16, F32, INT8])
def test_copies_equal_a_model_of_slots(dtype: torch.dtype) -> None:
    """Random block copies and slot moves, chains and overlaps included, against a list of tokens."""
    g = torch.Generator().manual_seed(0)
    layers = [caches(5, 3, 48, dtype) for _ in range(3)]
    everything = torch.arange(160)
    for i, pair in enumerate(layers):
        copy_twin.scatter_kv(*pair, everything, randn(160, 3, 48, seed=i), randn(160, 3, 48, seed=9 + i))
    model = [[x.clone() for x in copy_twin.gather_stored(k, v, everything)] for k, v in layers]
    copies = kv_copy.CacheCopies(TEAM, layers)
    for _ in range(12):
        src, dst = (torch.randint(0, 5, (3,), generator=g) for _ in range(2))
        copies.copy_blocks(src, dst)
        a, b = (torch.randint(0, 160, (7,), generator=g).sort().values for _ in range(2))
        copies.move_slots(a, b)
        for tokens in (x for pair in model for x in pair):
            for s, d in zip(src.tolist(), dst.tolist(), strict=True):
                tokens[32 * d : 32 * d + 32] = tokens[32 * s : 32 * s + 32].clone()
            for s, d in zip(a.tolist(), b.tolist(), strict=True):
                tokens[d] = tokens[s].clone()
    for (k, v), want in zip(layers, model, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(copy_twin.gather_stored(k, v, everything), want, strict=True))


@pytest.mark.parametrize("dtype", [BF16, INT8])
def test_an_accepted_path_moves_down_and_twins_agree(dtype: torch.dtype) -> None:
    """An ascending path lands on consecutive slots though sources and targets overlap; kernel and twin give equal bytes."""
    a = [caches(3, 2, 32, dtype) for _ in range(2)]
    for i, (k, v) in enumerate(a):
        copy_twin.scatter_kv(k, v, torch.arange(96), randn(96, 2, 32, seed=i), randn(96, 2, 32, seed=9 + i))
    b = [(k.clone(), v.clone()) for k, v in a]
    before = copy_twin.gather_kv(*a[1], torch.tensor([40, 42, 43, 71]))
    src, dst = torch.tensor([40, 42, 43, 71]), torch.tensor([40, 41, 42, 43])
    kv_copy.move_slots(TEAM, a, src, dst)
    kv_copy.copy_blocks(SOLO, a, torch.tensor([1]), torch.tensor([2]))
    copy_twin.move_slots(b, src, dst)
    copy_twin.copy_blocks(b, torch.tensor([1]), torch.tensor([2]))
    assert all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(copy_twin.gather_kv(*a[1], dst), before, strict=True))
    with pytest.raises(ConfigError, match="sources"):
        kv_copy.move_slots(TEAM, a, src, dst[:2])


@pytest.mark.parametrize("width", [1, 15, 16, 17, 65, 300])
def test_elementwise_kernels_equal_their_twins(width: int) -> None:
    """Activations, caps, embeddings: every tail, bf16 in or out."""
    x, out = 4 * randn(6, 2 * width), torch.empty(6, width)
    for name in ("silu_mul", "gelu_tanh_mul"):
        getattr(activation, name)(TEAM, x, out)
        torch.testing.assert_close(out, getattr(activation_twin, name)(x), atol=2e-6, rtol=2e-6)
    half = torch.empty(6, width, dtype=BF16)
    activation.gelu_tanh_mul(SOLO, x, half)
    assert torch.equal(half, out.bfloat16())
    activation.gelu_tanh(TEAM, x[:, width:], out)
    torch.testing.assert_close(out, activation_twin.gelu_tanh(x[:, width:]), atol=2e-6, rtol=2e-6)
    capped = x.clone()
    activation.softcap(TEAM, capped, 2.5)
    torch.testing.assert_close(capped, activation_twin.softcap(x, 2.5), atol=1e-6, rtol=2e-6)
    ids = torch.tensor([3, 0, 3, 9, 1, 2]).int()
    for dtype in (F32, BF16):
        weight = randn(10, width).to(dtype)
        activation.embedding(TEAM, ids, weight, out, 1.5)
        assert torch.equal(out, activation_twin.embedding(ids, weight, scale=1.5))


@pytest.mark.parametrize("weighted", [True, False])
def test_expert_parts_add_up_in_rank_order(weighted: bool) -> None:
    """Parts in any order give equal bits, and the twin's sum."""
    parts, h = randn(18, 50), randn(6, 50, seed=1)
    weight = torch.rand(6, 3) if weighted else None
    results = []
    for seed in range(2):
        order = torch.randperm(18, generator=torch.Generator().manual_seed(seed))
        inverse = order.argsort().int().view(6, 3)
        out = h.clone()
        activation.moe_combine(TEAM, parts[order].contiguous(), inverse, weight, out)
        results.append(out)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], activation_twin.moe_combine(parts, torch.arange(18).view(6, 3), weight, h), atol=1e-6, rtol=1e-6)


def test_twins_have_gradients() -> None:
    """Norm, rotation, gated activation and combination are differentiable in float64."""
    x, w = randn(3, 8).double().requires_grad_(), randn(8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: norm_twin.rmsnorm(a, b, 1e-6), (x, w))
    assert torch.autograd.gradcheck(lambda a, b: norm_twin.layernorm(a, b, b, 1e-6), (x, w))
    assert torch.autograd.gradcheck(activation_twin.silu_mul, (x,))
    angles = rope_twin.cos_sin_table(3, 4).double()
    assert torch.autograd.gradcheck(lambda a: rope_twin.rotate(a.view(3, 1, 8), angles), (x,))
