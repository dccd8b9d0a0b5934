"""The vector intrinsics against numpy and torch, the functions built from them against float64, and the compiled-code cache."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from presage.kernels.cpu import cache, gemm, registry, simd, simdmath
from presage.kernels.cpu.region import HEADER
from presage.kernels.cpu.team import Table

SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, 65504, 1 / 3, -1, 88.7, -103.9, 1e-8], np.float32
)


def elementwise(function: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Run a vector function over an array whose size is a multiple of 16."""

    @njit(error_model="numpy")
    def run(x, out):  # type: ignore[no-untyped-def]
        for i in range(0, x.size, 16):
            simd.store_f32(out, i, function(simd.load_f32(x, i)))

    def call(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        run(x, out)
        return out

    return call


def normal(size: int, seed: int = 0) -> np.ndarray:
    """Normal f32 values."""
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_bf16_rounds_and_widens_as_torch() -> None:
    @njit
    def narrow(x, out, back):  # type: ignore[no-untyped-def]
        for i in range(0, x.size, 16):
            simd.store_bf16(out, i, simd.load_f32(x, i))
            simd.store_f32(back, i, simd.load_bf16(out, i))
            simd.set_bf16(out, x.size + i, simd.get_f32(x, i))

    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits[:64] = np.arange(64, dtype=np.uint32) * 0x4000 + 0x3F800000  # exact halves between two bf16
    x = np.concatenate([SPECIAL, bits.view(np.float32)])
    out, back = np.zeros(2 * x.size, np.uint16), np.empty_like(x)
    narrow(x, out, back)
    wanted = torch.from_numpy(x).bfloat16()
    numbers = ~np.isnan(x)
    assert (out[: x.size][numbers] == wanted.view(torch.int16).numpy().view(np.uint16)[numbers]).all()
    assert (out[: x.size][~numbers] == 0x7FC0).all() and np.isnan(back[~numbers]).all()
    assert (back[numbers] == wanted.float().numpy()[numbers]).all()
    assert (out[x.size :: 16] == out[: x.size : 16]).all()


@pytest.mark.parametrize("count", range(17))
def test_first_lanes_only_are_read_and_written(count: int) -> None:
    @njit
    def copy(x, half, out, out_half, n):  # type: ignore[no-untyped-def]
        simd.store_f32_n(out, 0, simd.load_f32_n(x, 0, n), n)
        simd.store_bf16_n(out_half, 0, simd.load_bf16_n(half, 0, n), n)
        simd.store_f32(out, 16, simd.load_f32_n(x, 0, n))

    x, half = normal(16), np.arange(16, dtype=np.uint16) + 0x3F80
    x[count:], half[count:] = np.nan, 0x7FC0
    out, out_half = np.full(32, 7, np.float32), np.full(16, 9, np.uint16)
    copy(x, half, out, out_half, count)
    assert (out[:count] == x[:count]).all() and (out[count:16] == 7).all() and (out[16 + count :] == 0).all()
    assert (out_half[:count] == half[:count]).all() and (out_half[count:] == 9).all()


def test_operators_masks_and_reductions() -> None:
    @njit(error_model="numpy")
    def run(x, y, out, bits):  # type: ignore[no-untyped-def]
        a, b = simd.load_f32(x, 0), simd.load_f32(y, 0)
        simd.store_f32(out, 0, a + b * a - b / a)
        simd.store_f32(out, 16, simd.select((a < b) & (a > simd.zero_f32()), a, b))
        simd.store_f32(out, 32, simd.maximum(a, b))
        simd.store_f32(out, 48, simd.minimum(a, b))
        simd.store_i32(bits, 0, (simd.round_int(a * simd.broadcast_f32(np.float32(100))) << simd.broadcast_i32(2)) ^ simd.lane_index())
        out[64], out[65] = simd.reduce_sum(a), simd.reduce_max(a)
        out[66], out[67] = simd.any_of(a < b), simd.all_of(a < b)
        simd.store_f32(out, 68, simd.sqrt(simd.maximum(a, simd.zero_f32())))

    x, y = normal(16), normal(16, 1)
    out, bits = np.empty(84, np.float32), np.empty(16, np.int32)
    run(x, y, out, bits)
    assert (out[:16] == x + y * x - y / x).all()
    assert (out[16:32] == np.where((x < y) & (x > 0), x, y)).all()
    assert (out[32:48] == np.maximum(x, y)).all() and (out[48:64] == np.minimum(x, y)).all()
    assert (bits == (np.rint(x * np.float32(100)).astype(np.int32) << 2) ^ np.arange(16)).all()
    tree = x
    while tree.size > 1:
        tree = tree[: tree.size // 2] + tree[tree.size // 2 :]
    assert out[64] == tree[0] and out[65] == x.max() and list(out[66:68]) == [(x < y).any(), (x < y).all()]
    assert (out[68:84] == np.sqrt(np.maximum(x, 0))).all()


def test_dot_products() -> None:
    @njit
    def run(u, s, sums, x, y, out):  # type: ignore[no-untyped-def]
        simd.store_i32(sums, 0, simd.dot_u8s8(simd.broadcast_i32(3), simd.load_i32(u, 0), simd.load_i32(s, 0)))
        simd.store_f32(out, 0, simd.dot_bf16(simd.broadcast_f32(np.float32(0.5)), simd.load_i32(x, 0), simd.load_i32(y, 0)))
        simd.store_f32(out, 16, simd.pair_low(simd.load_i32(x, 0)))
        simd.store_f32(out, 32, simd.pair_high(simd.load_i32(x, 0)))
        simd.store_i32(sums, 16, simd.pair_join(simd.pair_low(simd.load_i32(x, 0)), simd.pair_high(simd.load_i32(x, 0))))

    rng = np.random.default_rng(0)
    u, s = rng.integers(0, 256, 64, dtype=np.uint8), rng.integers(-128, 128, 64, dtype=np.int8)
    u[:8], s[:8] = 255, -128
    x, y = (torch.from_numpy(normal(32, seed)).bfloat16() for seed in (2, 3))
    sums, out = np.empty(32, np.int32), np.empty(48, np.float32)
    raw = [t.view(torch.int16).numpy() for t in (x, y)]
    run(u.view(np.int32), s.view(np.int32), sums, raw[0].view(np.int32), raw[1].view(np.int32), out)
    assert (sums[:16] == 3 + (u.astype(np.int32) * s.astype(np.int32)).reshape(16, 4).sum(1)).all()
    wanted = 0.5 + (x.double() * y.double()).view(16, 2).sum(1).numpy()
    assert np.abs(out[:16] - wanted).max() < 1e-6
    assert (out[16:32] == x[::2].float().numpy()).all() and (out[32:] == x[1::2].float().numpy()).all()
    assert (sums[16:] == raw[0].view(np.int32)).all()


def truth(name: str, x: torch.Tensor) -> torch.Tensor:
    """The function in float64."""
    tanh_form = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return {
        "exp": torch.exp(x),
        "tanh": torch.tanh(x),
        "sigmoid": torch.sigmoid(x),
        "silu": x * torch.sigmoid(x),
        "gelu": x * torch.special.erfc(-x * 0.5**0.5) / 2,
        "gelu_tanh": x * torch.sigmoid(tanh_form),
    }[name]


@pytest.mark.parametrize(("name", "low", "high", "ulp"), [
    ("exp", -87, 88.7, 1.01), ("tanh", -20, 20, 3.2), ("sigmoid", -80, 20, 2.6), ("silu", -80, 80, 3.6), ("gelu", -12, 12, 8),
    ("gelu_tanh", -4, 12, 16),
])  # fmt: skip
def test_functions_against_float64(name: str, low: float, high: float, ulp: float) -> None:
    x = np.concatenate([np.linspace(low, high, 1 << 15), np.linspace(-1, 1, 1 << 12), normal(1 << 12) * 1e-4]).astype(np.float32)
    out, wanted = elementwise(getattr(simdmath, name))(x), truth(name, torch.from_numpy(x).double()).numpy()
    spacing = np.spacing(np.maximum(np.abs(wanted), 1.2e-38).astype(np.float32)).astype(np.float64)
    assert (np.abs(out - wanted) / spacing).max() <= ulp


def test_functions_at_the_edges() -> None:
    out = {name: elementwise(getattr(simdmath, name))(SPECIAL) for name in ("exp", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh")}
    assert all(np.isnan(values[4]) and np.isfinite(values[5:]).sum() >= 9 for values in out.values())
    assert list(out["exp"][:4]) == [1, 1, np.inf, 0] and out["exp"][14] == pytest.approx(np.exp(np.float64(SPECIAL[14])), abs=1.5e-45)
    assert list(out["tanh"][2:4]) == [1, -1] and list(out["sigmoid"][2:4]) == [1, 0]
    assert all(out[name][8] == SPECIAL[8] and out[name][9] == 0 for name in ("silu", "gelu", "gelu_tanh"))


def test_every_lane_computes_the_same() -> None:
    values = normal(64) * 5
    for name in ("exp", "tanh", "silu", "gelu", "gelu_tanh"):
        run = elementwise(getattr(simdmath, name))
        for shift in range(1, 16):
            assert (np.roll(run(np.roll(values, shift)), -shift) == run(values)).all()


@cache.kernel
def add_constant(amount: int) -> Any:
    """Adds a captured constant to the first parameter."""

    def run(table):  # type: ignore[no-untyped-def]
        simd.set_i64(table, HEADER, simd.get_i64(table, HEADER) + amount)

    return run


def fresh(amount: int) -> cache.Kernel:
    """The kernel as a new process would see it."""
    made = add_constant(amount)
    return cache.Kernel(made._factory, made._constants)


def test_kernels_are_cached_on_disk_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    for amount, cached in ((5, False), (5, True), (6, False)):
        item, table = fresh(amount), Table(1, 1)
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(item.address)(table.set(10))
        assert table.words[HEADER] == 10 + amount and item.from_cache is cached
    files = list(tmp_path.rglob("*.bin"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    item = fresh(5)
    assert item.load() and not item.from_cache


def test_an_edited_source_changes_the_stamp(tmp_path: Path) -> None:
    (tmp_path / "intrinsics.py").write_text("one = 1\n")
    before = cache.sources_stamp(tmp_path.glob("*.py"))
    assert cache.sources_stamp(tmp_path.glob("*.py")) == before
    (tmp_path / "intrinsics.py").write_text("one = 2\n")
    assert cache.sources_stamp(tmp_path.glob("*.py")) != before


def test_a_kernel_depends_on_what_its_module_imports() -> None:
    names = {path.stem for path in cache.sources_of(Path(str(gemm.__file__)))}
    assert names >= {"gemm", "epilogue", "simd", "simdmath", "vectors", "isa", "cache", "region"} and not names & {
        "linear",
        "registry",
        "attention",
    }
    assert {path.stem for path in cache.sources_of(Path(__file__))} > names


def test_old_versions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    path = fresh(5)._path()
    path.parent.mkdir(parents=True)
    for age in range(8):
        old = path.with_name(path.name[:-20] + f"{age:016d}.bin")
        old.write_bytes(b"")
        os.utime(old, (1000 - age, 1000 - age))
    fresh(5).load()
    assert path.exists() and len(list(path.parent.glob("*.bin"))) == cache.KEEP


def test_registry_finds_the_matrix_products() -> None:
    names = [item.name for item in registry.all_kernels()]
    assert {name.split("-")[1] for name in names if name.startswith("gemm-")} >= {"bf16", "f32"} and len(set(names)) == len(names)


CHECKSUM = """
import hashlib, torch
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.linear import linear
from presage.kernels.cpu.pack import pack_gate_up
from presage.kernels.cpu.team import Team
random = torch.Generator().manual_seed(0)
x, gate, up = (torch.randn(rows, 77, generator=random) for rows in (11, 70, 70))
out = torch.empty(11, 70)
linear(Team(2), x, pack_gate_up(gate, up, "f32"), out, act="gelu_mul")
print(current_isa().name, hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_f32_bits_are_the_same_on_avx2() -> None:
    found = []
    for cpu in ("", "haswell"):
        environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""} if cpu else dict(os.environ)
        done = subprocess.run([sys.executable, "-c", CHECKSUM], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found[1][0] == "avx2" and found[0][1] == found[1][1]
