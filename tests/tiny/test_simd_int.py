"""Every vector intrinsic against numpy, word by word, and the same bits from every instruction set that this machine can run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding

from presage.kernels.cpu import simd, simd_int
from presage.kernels.cpu.isa import current_isa, of_features
from tests.tiny import simd_ops
from tests.tiny.simd_ops import COUNT, FLOAT, INTEGER, MEMORY, STATE, bytes_of, floats, integers, results

Words = dict[str, np.ndarray]


def words(value: Any) -> np.ndarray:
    """f32, int32 or booleans as int32 words."""
    value = np.ascontiguousarray(value)
    return value.view(np.int32) if value.dtype == np.float32 else value.astype(np.int32)


def rows(value: Any) -> np.ndarray:
    """One value per vector in all lanes."""
    return np.repeat(words(value)[:, None], 16, 1)


def check(found: Words, wanted: Words) -> None:
    """Equal bits, NaNs aside: where a NaN is wanted there is one."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        nan = np.isnan(value.view(np.float32)) & np.isnan(found[name].view(np.float32))
        wrong = (found[name] != value) & ~nan
        assert not wrong.any(), f"{name}: {found[name][wrong][:4]} instead of {value[wrong][:4]}, {wrong.sum()} of {wrong.size}"


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z rounded once to f32: the exact product in f64, a sum rounded to odd, which a second rounding cannot spoil."""
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = total.view(np.int64)
        inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        bits = np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits)
        return bits.view(np.float64).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    """f32 to the 16 bits of bf16; NaN becomes 0x7fc0."""
    rounded = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_int(x: np.ndarray, low: int, high: int) -> np.ndarray:
    """Nearest even, saturated, 0 for NaN."""
    return np.clip(np.rint(np.where(np.isnan(x), 0, x).astype(np.float64)), low, high).astype(np.int64).astype(np.int32)


def folded(x: np.ndarray, combine: Any) -> np.ndarray:
    """[n, 16] to [n] by the tree 8+8, 4+4, 2+2, 1+1."""
    while x.shape[1] > 1:
        x = combine(x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])
    return x[:, 0]


def larger(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(x > y, x, y)


def float_wanted(a: np.ndarray, b: np.ndarray) -> Words:
    eight = np.concatenate([to_int(a, -128, 127), to_int(b, -128, 127)], 1).astype(np.int8).view(np.int32)
    halves = bf16(a).view(np.int32)
    with np.errstate(all="ignore"):
        values = [
            a + b, a - b, a * b, a / b, fused(a, b, a), np.sqrt(a), larger(a, b), np.where(a < b, a, b), np.where(a < b, a, b), np.abs(a),
            larger(np.abs(b), a), a, (bf16(a).astype(np.uint32) | bf16(b).astype(np.uint32) << 16).view(np.int32),
            to_int(a, -(1 << 31), (1 << 31) - 1), to_int(a, -128, 127), np.concatenate([eight, halves], 1),
            np.concatenate([bf16(a), bf16(b)], 1).view(np.int32), a < b, a <= b, a > b, a >= b, a == b,
        ]  # fmt: skip
        tree = [folded(a, np.add), folded(a, larger), folded(np.abs(a), larger)]
    return dict(zip(FLOAT, [*map(words, values), *map(rows, tree)], strict=True))


def pairs_dot(acc: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum of the products of all parts of a lane, modulo 2^32; x and y already as [n, 16, parts]."""
    return (acc + (x.astype(np.int64) * y.astype(np.int64)).sum(2)).astype(np.uint64).astype(np.uint32).view(np.int32)


def lookups(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lookup_u8 and permute_u16."""
    table, index = a.view(np.uint8)[:, :16], b.view(np.uint8) & 15
    halves, places = a.view(np.uint16), b.view(np.uint16) & 31
    return np.take_along_axis(table, index, 1).view(np.int32), np.take_along_axis(halves, places.astype(np.int64), 1).view(np.int32)


def tables_u16(first: np.ndarray) -> np.ndarray:
    """Tables of the numbers that `integer_ops` gives."""
    entries = np.tile(np.array([*range(13), 0xFFFF, 0xFFFF, 0], np.uint16), (len(first), 1))
    entries[:, 0], entries[:, 12] = first, first + np.uint16(12)
    return np.concatenate([entries, entries], 1).view(np.int32)


def dot_bf16_wanted(a: np.ndarray, b: np.ndarray, instruction: bool) -> np.ndarray:
    """Two fused additions, high halves first; the instruction takes denormals for zero, on both sides."""

    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x) if instruction else x

    total = np.full(a.shape, 0.5, np.float32)
    for x, y in ((a & -65536, b & -65536), (a << 16, b << 16)):
        total = flush(fused(flush(x.view(np.float32)), flush(y.view(np.float32)), total))
    return total


def integer_wanted(a: np.ndarray, b: np.ndarray) -> Words:
    n, shift, low, bytes_a, bytes_b = len(a), b & 31, 0x0F0F0F0F, a.view(np.uint8).reshape(-1, 16, 4), b.view(np.int8).reshape(-1, 16, 4)
    halves = [v.view(np.int16).reshape(-1, 16, 2) for v in (a, b)]
    looked, permuted = lookups(a, b)
    lanes, first = np.arange(16), [np.arange(16) < count for count in (11, 3, 8)]
    zero, sums = np.zeros((n, 16), np.int32), (a.astype(np.int64).sum(1) >> 4).astype(np.uint64).astype(np.uint32).view(np.int32)
    with np.errstate(all="ignore"):
        values = [
            a + b, a - b, a * b, a & b, a | b, a ^ b, a << shift, (a.view(np.uint32) >> shift.view(np.uint32)).view(np.int32),
            a < b, a <= b, a > b, a >= b, a == b, np.where(a < b, a, b), a.astype(np.float32), a, a << 16, a & -65536, a & low, (a >> 4) & low,
            looked, permuted, pairs_dot(b, bytes_a, bytes_b), pairs_dot(b, bytes_a & 127, bytes_b), pairs_dot(b, *halves),
            dot_bf16_wanted(a, b, current_isa().bf16_dot), rows(sums), zero + lanes, zero, zero,
            rows((a == b).any(1)), rows((a == b).all(1)), (a < b) & first[0], (a < b) | first[1], (a < b) ^ first[2],
            a[:, [*range(8)] * 2], tables_u16(a.view(np.uint16)[:, 0]),
        ]  # fmt: skip
    return dict(zip(INTEGER, map(words, values), strict=True))


def spread(memory: np.ndarray, kind: Any, at: int, vectors: int, count: int = 16) -> np.ndarray:
    """`count` numbers from byte v + at on for each vector v."""
    size = np.dtype(kind).itemsize * count
    return np.stack([memory[v + at : v + at + size].view(kind) for v in range(vectors)])


def patched(vectors: int, kind: Any, at: int, values: np.ndarray) -> np.ndarray:
    """Words of -1 with numbers of `kind` written from the at-th on."""
    out = np.full((vectors, 16), -1, np.int32)
    out.view(kind)[:, at : at + values.shape[1]] = values
    return out


def memory_wanted(memory: np.ndarray, n: int) -> Words:
    def column(kind: Any, at: int) -> np.ndarray:
        return spread(memory, kind, at, n, 1)[:, 0]

    def wide(halves: np.ndarray) -> np.ndarray:
        return (halves.astype(np.uint32) << 16).view(np.float32)

    inside = np.arange(16) < (np.arange(n) % 17)[:, None]
    reals, long = spread(memory, np.float32, 0, n), spread(memory, np.int64, 0, n, 1)
    values = [
        spread(memory, np.float16, 2, n).astype(np.float32), wide(spread(memory, np.uint16, 2, n)), spread(memory, np.uint8, 1, n),
        spread(memory, np.int8, 1, n), rows(column(np.int32, 4)), rows(column(np.int32, 4)), rows(wide(column(np.uint16, 2))),
        np.where(inside, spread(memory, np.int32, 4, n), 0), np.where(inside, words(wide(spread(memory, np.uint16, 2, n))), 0),
        np.where(inside, words(reals), -1),
        np.concatenate([np.where(inside, bf16(reals), 0xFFFF).astype(np.uint16).view(np.int32), np.full((n, 8), -1)], 1),
        rows(column(np.float32, 4)), rows(wide(column(np.uint16, 2))), rows((column(np.int64, 8) >> 20).astype(np.int32)),
        rows(column(np.int32, 4) >> 1), rows(column(np.uint16, 2)), rows(column(np.int8, 1)), rows(column(np.uint8, 1)),
        patched(n, np.int32, 1, spread(memory, np.int32, 0, n, 1)), patched(n, np.int32, 1, spread(memory, np.int32, 0, n, 1)),
        patched(n, np.int64, 1, long), patched(n, np.uint8, 1, spread(memory, np.uint8, 0, n, 1)), patched(n, np.uint16, 1, bf16(reals[:, :1])),
    ]  # fmt: skip
    return dict(zip(MEMORY, map(words, values), strict=True))


def apart(x: np.ndarray) -> np.ndarray:
    return x * x + np.int32(1)


def state_wanted(x: np.ndarray) -> Words:
    long = x.view(np.int64)[:, :1]
    ints = [x + np.int32(i) for i in range(COUNT)]
    total, reals = np.zeros_like(x), np.zeros(x.shape, np.float32)
    for value in reversed(ints):
        total, reals = total * np.int32(3) + value, reals * np.float32(3) + value.astype(np.float32)
    # The counter that atomic_add found held -1.
    values = [np.full_like(x, 4), rows((long[:, 0] >> 7).astype(np.int32)), patched(len(x), np.int64, 3, long), total, reals, apart(apart(x))]
    return dict(zip(STATE, map(words, values), strict=True))


def check_integers(a: np.ndarray, b: np.ndarray) -> None:
    check(results(simd_ops.integer_ops(), INTEGER, a, b, len(a)), integer_wanted(a, b))


def test_floats() -> None:
    check(results(simd_ops.float_ops(), FLOAT, floats(0), floats(1), 384), float_wanted(floats(0), floats(1)))


def test_integers() -> None:
    check_integers(integers(2), integers(3))


def test_memory_at_every_alignment_and_count() -> None:
    check(results(simd_ops.memory_ops(), MEMORY, bytes_of(7), bytes_of(7), 300), memory_wanted(bytes_of(7), 300))


def test_counters_and_registers() -> None:
    check(results(simd_ops.state_ops(COUNT), STATE, integers(4), bytes_of(7), 384), state_wanted(integers(4)))


def test_all_halves_widen_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    found = results(simd_ops.half_ops(), ["load_f16"], halves, halves, 4096)["load_f16"].reshape(-1)
    wanted = halves.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(wanted)
    assert (found[numbers] == wanted.view(np.int32)[numbers]).all()
    # NaNs keep sign and payload and become quiet.
    bits = halves[~numbers].astype(np.int64)
    assert (found[~numbers].view(np.uint32) == ((bits & 0x8000) << 16 | 0x7FC00000 | (bits & 0x3FF) << 13)).all()


def test_no_intrinsic_is_left_out() -> None:
    text = Path(simd_ops.__file__).read_text()
    public = [name for module in (simd, simd_int) for name, value in vars(module).items() if isinstance(value, type(simd.fma)) and name[0] != "_"]
    assert len(public) > 70 and not [name for name in public if not re.search(rf"\b{name}\b\(", text)]


BYTES = st.binary(min_size=128, max_size=128)


@settings(deadline=None, max_examples=60)
@given(BYTES)
def test_any_words(raw: bytes) -> None:
    a, b = (np.frombuffer(raw[half : half + 64], np.int32).reshape(1, 16).copy() for half in (0, 64))
    check_integers(a, b)
    x, y = a.view(np.float32), b.view(np.float32)
    check(results(simd_ops.float_ops(), FLOAT, x, y, 1), float_wanted(x, y))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-200, 200, width=32), min_size=16, max_size=16), st.integers(-1, 1))
def test_rounding_near_halves(values: list[float], step: int) -> None:
    near = (np.rint(np.array([values], np.float32) * 2) / 2).astype(np.float32)
    x = np.nextafter(near, np.float32(np.inf) * np.float32(step)) if step else near
    found = results(simd_ops.float_ops(), FLOAT, x, x, 1)
    assert (found["round_i8"] == to_int(x, -128, 127)).all() and (found["round_int"] == to_int(x, -(1 << 31), (1 << 31) - 1)).all()


def other_cpus() -> list[tuple[str, str]]:
    """(NUMBA_CPU_NAME, level) of what this machine can run."""
    if not binding.get_process_triple().startswith("x86_64"):
        return []
    host = of_features(dict(binding.get_host_cpu_features()), arm=False)
    known = [("skylake-avx512", "avx512", 512), ("cascadelake", "avx512_vnni", 512), ("haswell", "avx2", 256), ("nonesuch", "base", 0)]
    return [(cpu, level) for cpu, level, bits in known if bits <= host.bits and not (level == "avx512_vnni" and not host.vnni)]


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    """Checksums of this process."""
    return {name: simd_ops.checksum(value) for name, value in simd_ops.everything().items()}


def bits_on(cpu: str) -> dict[str, str]:
    """Checksums of a process that compiles for another CPU."""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CPU_FEATURES"} | {"NUMBA_CPU_NAME": cpu}
    command = [sys.executable, "-m", "tests.tiny.simd_ops"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize(("cpu", "level"), other_cpus())
def test_bits_are_the_same_on(cpu: str, level: str, here: dict[str, str]) -> None:
    found = bits_on(cpu)
    assert found.pop("isa") == level
    different = {name for name in here if found[name] != here[name]}
    assert set(found) == set(here) and different <= ({"integer.dot_bf16"} if current_isa().bf16_dot else set())
    wanted = dot_bf16_wanted(integers(2), integers(3), instruction=False).view(np.int32)
    assert found["integer.dot_bf16"] == simd_ops.checksum(wanted)
