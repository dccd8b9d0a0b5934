"""The packed linear against its twin, and the promise that a row's bits are its own."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError
from presage.kernels.cpu.linear import Experts, grouped_linear, linear
from presage.kernels.cpu.pack import PackedLinear, pack, pack_gate_up, unpack
from presage.kernels.cpu.team import Team
from presage.kernels.errors import KernelArgumentError
from presage.kernels.reference import linear as twin

DTYPE = {"bf16": torch.bfloat16, "f32": torch.float32}
FORMATS = sorted(DTYPE)


@cache
def team(threads: int = 2) -> Team:
    """One team per size, as in an engine."""
    return Team(threads)


def matrix(rows: int, columns: int, fmt: str, seed: int = 0) -> torch.Tensor:
    """Normal values of the format's type."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DTYPE[fmt])


def close(out: torch.Tensor, wanted: torch.Tensor, scale: float = 1e-5) -> bool:
    """Equal within accumulation error, relative to the largest value."""
    return bool((out.double() - wanted.double()).abs().max() <= scale * (1 + wanted.double().abs().max()))


def apply(x: torch.Tensor, p: PackedLinear, threads: int = 2, **epilogue: object) -> torch.Tensor:
    """`linear` into a fresh f32 output that starts as NaN."""
    out = torch.full((x.shape[0], p.n), float("nan"))
    linear(team(threads), x, p, out, **epilogue)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (16, 8), (48, 64), (49, 31), (95, 33), (130, 257), (97, 4097), (50, 9001)])
def test_pack_and_unpack_are_inverse_and_product_is_right(fmt: str, shape: tuple[int, int]) -> None:
    w, x = matrix(*shape, fmt), matrix(5, shape[1], fmt, 1)
    p = pack(w, fmt)
    assert torch.equal(unpack(p), w)
    assert torch.equal(unpack(pack(w, fmt, team=team())), w)
    wanted = x.double() @ w.double().T
    assert ((apply(x, p) - wanted).abs() <= 1e-5 * (x.double().abs() @ w.double().abs().T)).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(100, 70), (49, 2049), (48, 9001)])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows_or_threads(fmt: str, shape: tuple[int, int]) -> None:
    p, x = pack(matrix(*shape, fmt), fmt), matrix(512, shape[1], fmt, 1)
    single = torch.cat([apply(x[r : r + 1], p, 1) for r in range(512)])
    for rows in (*range(1, 34), 64, 100, 257, 512):
        assert torch.equal(apply(x[:rows], p), single[:rows]), rows
        assert torch.equal(apply(x[512 - rows :], p, 3), single[512 - rows :]), rows


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_of_a_column_do_not_depend_on_its_neighbours(fmt: str) -> None:
    w, x = matrix(130, 90, fmt), matrix(9, 90, fmt, 1)
    assert torch.equal(apply(x, pack(w[37:101], fmt)), apply(x, pack(w, fmt))[:, 37:101])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("act", [None, "silu", "gelu_tanh", "gelu"])
def test_epilogues_together(fmt: str, act: str | None) -> None:
    w, x = matrix(61, 40, fmt), matrix(11, 40, fmt, 1)
    p, bias, scale, start = pack(w, fmt), torch.randn(61), torch.randn(11), torch.randn(11, 61)
    assert close(apply(x, p, bias=bias, act=act), twin.linear(x, w, bias=bias, act=act))
    assert close(apply(x, p, act=act, scale_rows=scale), twin.linear(x, w, act=act, scale_rows=scale))
    assert close(apply(x, p, act=act, softcap=3.0), twin.linear(x, w, act=act, softcap=3.0))
    out = start.clone()
    linear(team(), x, p, out, bias=bias, residual=out, act=act, scale_rows=scale)
    assert close(out, twin.linear(x, w, bias=bias, residual=start, act=act, scale_rows=scale))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("n", [1, 7, 24, 25, 47, 48, 100])
def test_gate_and_up(fmt: str, n: int) -> None:
    gate, up, x = matrix(n, 50, fmt), matrix(n, 50, fmt, 1), matrix(10, 50, fmt, 2)
    p, both = pack_gate_up(gate, up, fmt), torch.cat([gate, up])
    assert torch.equal(unpack(p), both)
    for act in ("silu_mul", "gelu_tanh_mul", "gelu_mul"):
        assert close(apply(x, p, act=act), twin.linear(x, both, act=act))
    bias, start = torch.randn(2 * n), torch.randn(10, n)
    out = start.clone()
    linear(team(), x, p, out, bias=bias, residual=out, act="silu_mul")
    assert close(out, twin.linear(x, both, bias=bias, residual=start, act="silu_mul"))
    assert torch.equal(apply(x[3:4], p, 1, act="silu_mul"), apply(x, p, act="silu_mul")[3:4])


@pytest.mark.parametrize("fmt", FORMATS)
def test_bf16_output_is_the_rounded_f32_output(fmt: str) -> None:
    w, x = matrix(77, 64, fmt), matrix(9, 64, fmt, 1)
    p, out = pack(w, fmt), torch.full((9, 100), float("nan"), dtype=torch.bfloat16)
    linear(team(), x, p, out[:, 11:88])
    assert torch.equal(out[:, 11:88], apply(x, p).bfloat16())
    assert out[:, :11].isnan().all() and out[:, 88:].isnan().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_strided_rows_and_poison_around_them(fmt: str) -> None:
    w, wide = matrix(50, 33, fmt), torch.full((6, 80), float("nan"), dtype=DTYPE[fmt])
    wide[:, 17:50] = matrix(6, 33, fmt, 1)
    assert torch.equal(apply(wide[:, 17:50], pack(w, fmt)), apply(wide[:, 17:50].contiguous(), pack(w, fmt)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_infinity_stay_in_their_row(fmt: str) -> None:
    w, x = matrix(50, 31, fmt), matrix(10, 31, fmt, 1)
    clean = apply(x, pack(w, fmt))
    x[2], x[5, 30] = float("nan"), float("inf")
    out = apply(x, pack(w, fmt))
    others = [0, 1, 3, 4, 6, 7, 8, 9]
    assert torch.equal(out[others], clean[others]) and out[2].isnan().all() and out[5].isinf().all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 70), st.integers(1, 90), st.sampled_from(FORMATS), st.booleans()
)
def test_grouped_rows_equal_single_calls(counts: list[int], n: int, k: int, fmt: str, gated: bool) -> None:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    rows, act = int(offsets[-1]), "silu_mul" if gated else None
    raw = [[matrix(n, k, fmt, 2 * e + i) for i in range(1 + gated)] for e in range(len(counts))]
    packs = [pack_gate_up(*w, fmt) if gated else pack(*w, fmt) for w in raw]
    x, scale = matrix(rows, k, fmt, 99), torch.randn(rows)
    bias, out = torch.randn(len(counts), n * (1 + gated)), torch.full((rows, n), float("nan"))
    grouped_linear(team(), x, Experts(packs), offsets, out, bias=bias, act=act, row_scale=scale)
    wanted = twin.grouped_linear(x, [torch.cat(w) for w in raw], offsets, bias=bias, act=act, row_scale=scale)
    assert rows == 0 or close(out, wanted)
    for e, p in enumerate(packs):
        part = slice(int(offsets[e]), int(offsets[e + 1]))
        assert torch.equal(out[part], apply(x[part], p, bias=bias[e], act=act, scale_rows=scale[part]))


def test_an_expert_may_move() -> None:
    packs = [pack(matrix(20, 16, "f32", seed), "f32") for seed in range(2)]
    experts, other = Experts(packs), pack(matrix(20, 16, "f32", 7), "f32")
    x, out = matrix(4, 16, "f32", 3), torch.empty(4, 20)
    experts.replace(1, other)
    grouped_linear(team(), x, experts, torch.tensor([0, 1, 4], dtype=torch.int32), out)
    assert torch.equal(out[1:], apply(x[1:], other))


def test_wrong_operands_are_refused() -> None:
    p, x, out = pack(matrix(20, 16, "bf16"), "bf16"), matrix(4, 16, "bf16"), torch.empty(4, 20)
    wrong = [
        (x.double(), out, {}),
        (x[:, :15], out, {}),
        (x, out[:3], {}),
        (x, out.double(), {}),
        (x, torch.empty(20, 4).T, {}),
        (x, out, {"residual": out.clone()}),
        (x, out.bfloat16(), {"residual": "out"}),
        (x, out, {"act": "silu_mul"}),
        (x, out, {"bias": torch.zeros(19)}),
        (x, out, {"bias": torch.zeros(20, dtype=torch.float64)}),
        (x, out, {"scale_rows": torch.zeros(3)}),
    ]
    for rows, target, epilogue in wrong:
        options = {key: target if value == "out" else value for key, value in epilogue.items()} if "residual" in epilogue else epilogue
        with pytest.raises(KernelArgumentError):
            linear(team(), rows, p, target, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        linear(team(), x, p, out, act="relu7")
    with pytest.raises(ConfigError):
        pack(torch.ones(2, 2), "q3")
    with pytest.raises(KernelArgumentError):
        grouped_linear(team(), x, Experts([p]), torch.tensor([0, 3], dtype=torch.int32), out)


def test_zero_rows_do_nothing() -> None:
    p = pack(matrix(20, 16, "bf16"), "bf16")
    assert apply(torch.empty(0, 16, dtype=torch.bfloat16), p).shape == (0, 20)


def test_twin_is_differentiable() -> None:
    x, w, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (8, 5), (8,)))
    assert torch.autograd.gradcheck(lambda x, w, b: twin.linear(x, w, bias=b, act="silu_mul"), (x, w, bias))
