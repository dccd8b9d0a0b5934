"""All vector intrinsics in a few kernels, for the tests: every result as 16 words, under the intrinsic's name.

    python -m tests.tiny.simd_ops        # the instruction set, then a checksum of each intrinsic's results

run under another NUMBA_CPU_NAME, it says whether that lowering has the same bits.
"""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import numpy as np

from presage.kernels.cpu import simd, simd_int
from presage.kernels.cpu.cache import Kernel, device, kernel, subroutine
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.region import HEADER
from presage.kernels.cpu.simd import broadcast_f32, broadcast_i32, get_i64, int_bits, load_f32, load_i32, select_i32, store_i32
from presage.kernels.cpu.team import Table

VECTORS, FIRST, SECOND, OUT = range(HEADER, HEADER + 4)


def names(text: str) -> list[str]:
    """Words of a text."""
    return text.split()


FLOAT = names(
    "add sub mul truediv fma sqrt maximum minimum select absolute max_abs store_f32 pair_join round_int round_i8 store_i8 store_bf16 "
    "lt le gt ge eq reduce_sum reduce_max reduce_max_abs"
)
INTEGER = names(
    "add sub mul and_ or_ xor lshift rshift lt le gt ge eq select_i32 float_of float_bits pair_low pair_high low_nibbles high_nibbles "
    "lookup_u8 permute_u16 dot_u8s8 dot_u7s8 dot_i16 dot_bf16 "
    "reduce_sum_i32 lane_index zero_i32 zero_f32 any_of all_of mask_and mask_or mask_xor "
    "repeat_low_half table_u16"
)
MEMORY = names(
    "load_f16 load_bf16 load_u8 load_i8 splat_load_f32 splat_load_i32 splat_load_bf16 load_f32_n load_bf16_n store_f32_n store_bf16_n "
    "get_f32 get_bf16 get_i64 get_i32 get_u16 get_i8 get_u8 set_f32 set_i32 set_i64 set_u8 set_bf16"
)
STATE = names("atomic_add atomic_load atomic_store registers_i32 registers_f32 outlined")
COUNT = 5


@device
def _put(out, at, step, value):  # type: ignore[no-untyped-def]
    store_i32(out, at, value)
    return at + step


@device
def _where(mask):  # type: ignore[no-untyped-def]
    return select_i32(mask, broadcast_i32(1), broadcast_i32(0))


@device
def _all(value):  # type: ignore[no-untyped-def]
    return int_bits(broadcast_f32(value))


@subroutine
def _apart(value):  # type: ignore[no-untyped-def]
    simd.outlined()
    return value * value + broadcast_i32(1)


@kernel
def float_ops() -> Any:
    """`FLOAT` over two vectors of f32."""

    def run(table):  # type: ignore[no-untyped-def]
        vectors, x, y, out = get_i64(table, VECTORS), get_i64(table, FIRST), get_i64(table, SECOND), get_i64(table, OUT)
        step = 16 * vectors
        for at in range(0, step, 16):
            a, b = load_f32(x, at), load_f32(y, at)
            to = _put(out, at, step, int_bits(a + b))
            to = _put(out, to, step, int_bits(a - b))
            to = _put(out, to, step, int_bits(a * b))
            to = _put(out, to, step, int_bits(a / b))
            to = _put(out, to, step, int_bits(simd.fma(a, b, a)))
            to = _put(out, to, step, int_bits(simd.sqrt(a)))
            to = _put(out, to, step, int_bits(simd.maximum(a, b)))
            to = _put(out, to, step, int_bits(simd.minimum(a, b)))
            to = _put(out, to, step, int_bits(simd.select(a < b, a, b)))
            to = _put(out, to, step, int_bits(simd_int.absolute(a)))
            to = _put(out, to, step, int_bits(simd_int.max_abs(a, b)))
            simd.store_f32(out, to, a)
            to += step
            to = _put(out, to, step, simd.pair_join(a, b))
            to = _put(out, to, step, simd.round_int(a))
            to = _put(out, to, step, simd_int.round_i8(a))
            simd.store_i8(out + 4 * to, 0, simd_int.round_i8(a))
            simd.store_i8(out + 4 * to, 16, simd_int.round_i8(b))
            simd.store_bf16(out + 4 * to, 16, a)
            simd.store_bf16(out + 4 * (to + step), 0, a)
            simd.store_bf16(out + 4 * (to + step), 16, b)
            to += 2 * step
            to = _put(out, to, step, _where(a < b))
            to = _put(out, to, step, _where(a <= b))
            to = _put(out, to, step, _where(a > b))
            to = _put(out, to, step, _where(a >= b))
            to = _put(out, to, step, _where(a == b))
            to = _put(out, to, step, _all(simd.reduce_sum(a)))
            to = _put(out, to, step, _all(simd.reduce_max(a)))
            to = _put(out, to, step, _all(simd_int.reduce_max_abs(a)))

    return run


@kernel
def integer_ops() -> Any:
    """`INTEGER` over two vectors of i32."""

    def run(table):  # type: ignore[no-untyped-def]
        vectors, x, y, out = get_i64(table, VECTORS), get_i64(table, FIRST), get_i64(table, SECOND), get_i64(table, OUT)
        step = 16 * vectors
        for at in range(0, step, 16):
            a, b = load_i32(x, at), load_i32(y, at)
            to = _put(out, at, step, a + b)
            to = _put(out, to, step, a - b)
            to = _put(out, to, step, a * b)
            to = _put(out, to, step, a & b)
            to = _put(out, to, step, a | b)
            to = _put(out, to, step, a ^ b)
            to = _put(out, to, step, a << (b & broadcast_i32(31)))
            to = _put(out, to, step, a >> (b & broadcast_i32(31)))
            to = _put(out, to, step, _where(a < b))
            to = _put(out, to, step, _where(a <= b))
            to = _put(out, to, step, _where(a > b))
            to = _put(out, to, step, _where(a >= b))
            to = _put(out, to, step, _where(a == b))
            to = _put(out, to, step, select_i32(a < b, a, b))
            to = _put(out, to, step, int_bits(simd.float_of(a)))
            to = _put(out, to, step, int_bits(simd.float_bits(a)))
            to = _put(out, to, step, int_bits(simd.pair_low(a)))
            to = _put(out, to, step, int_bits(simd.pair_high(a)))
            to = _put(out, to, step, simd_int.low_nibbles(a))
            to = _put(out, to, step, simd_int.high_nibbles(a))
            to = _put(out, to, step, simd_int.lookup_u8(a, b))
            to = _put(out, to, step, simd_int.permute_u16(a, b))
            to = _put(out, to, step, simd.dot_u8s8(b, a, b))
            to = _put(out, to, step, simd_int.dot_u7s8(b, a & broadcast_i32(0x7F7F7F7F), b))
            to = _put(out, to, step, simd_int.dot_i16(b, a, b))
            to = _put(out, to, step, int_bits(simd.dot_bf16(broadcast_f32(np.float32(0.5)), a, b)))
            to = _put(out, to, step, broadcast_i32(simd_int.reduce_sum_i32(a) >> 4))
            to = _put(out, to, step, simd.lane_index())
            to = _put(out, to, step, simd.zero_i32())
            to = _put(out, to, step, int_bits(simd.zero_f32()))
            to = _put(out, to, step, broadcast_i32(1 if simd.any_of(a == b) else 0))
            to = _put(out, to, step, broadcast_i32(1 if simd.all_of(a == b) else 0))
            to = _put(out, to, step, _where((a < b) & simd.first_lanes(11)))
            to = _put(out, to, step, _where((a < b) | simd.first_lanes(3)))
            to = _put(out, to, step, _where((a < b) ^ simd.first_lanes(8)))
            to = _put(out, to, step, simd_int.repeat_low_half(a))
            n = simd.get_u16(x, 2 * at)
            to = _put(out, to, step, simd_int.table_u16(n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, n + 12, -1, 65535, 65536))

    return run


@kernel
def memory_ops() -> Any:
    """`MEMORY`: vector v reads `first` from byte v on, so at every alignment, and of partial loads and stores v % 17 lanes."""

    def run(table):  # type: ignore[no-untyped-def]
        vectors, x, out = get_i64(table, VECTORS), get_i64(table, FIRST), get_i64(table, OUT)
        step = 16 * vectors
        for v in range(vectors):
            at, count, to = x + v, v % 17, 16 * v
            to = _put(out, to, step, int_bits(simd_int.load_f16(at, 1)))
            to = _put(out, to, step, int_bits(simd.load_bf16(at, 1)))
            to = _put(out, to, step, simd.load_u8(at, 1))
            to = _put(out, to, step, simd.load_i8(at, 1))
            to = _put(out, to, step, int_bits(simd.splat_load_f32(at, 1)))
            to = _put(out, to, step, simd.splat_load_i32(at, 1))
            to = _put(out, to, step, int_bits(simd.splat_load_bf16(at, 1)))
            to = _put(out, to, step, int_bits(simd.load_f32_n(at, 1, count)))
            to = _put(out, to, step, int_bits(simd.load_bf16_n(at, 1, count)))
            simd.store_f32_n(out, to, simd.load_f32(at, 0), count)
            to += step
            simd.store_bf16_n(out, 2 * to, simd.load_f32(at, 0), count)
            to += step
            to = _put(out, to, step, _all(simd.get_f32(at, 1)))
            to = _put(out, to, step, _all(simd.get_bf16(at, 1)))
            to = _put(out, to, step, broadcast_i32(get_i64(at, 1) >> 20))
            to = _put(out, to, step, broadcast_i32(simd.get_i32(at, 1) >> 1))
            to = _put(out, to, step, broadcast_i32(simd.get_u16(at, 1)))
            to = _put(out, to, step, broadcast_i32(simd.get_i8(at, 1)))
            to = _put(out, to, step, broadcast_i32(simd.get_u8(at, 1)))
            simd.set_f32(out, to + 1, simd.get_f32(at, 0))
            to += step
            simd.set_i32(out, to + 1, get_i64(at, 0))
            to += step
            simd.set_i64(out, to // 2 + 1, get_i64(at, 0))
            to += step
            simd.set_u8(out, 4 * to + 1, get_i64(at, 0))
            to += step
            simd.set_bf16(out, 2 * to + 1, simd.get_f32(at, 0))

    return run


@kernel
def state_ops(count: int) -> Any:
    """`STATE`: counters in the output itself, and `count` registers of each kind written and then read in reverse."""

    def run(table):  # type: ignore[no-untyped-def]
        vectors, x, out = get_i64(table, VECTORS), get_i64(table, FIRST), get_i64(table, OUT)
        step = 16 * vectors
        for at in range(0, step, 16):
            simd.prefetch(x, 4 * at)
            simd.prefetch_l2(0, at)  # nothing is there, and nothing happens
            simd.pause()
            to = _put(out, at, step, broadcast_i32(simd.atomic_add(out, at // 2, get_i64(x, at // 2)) + 5))
            simd.set_i64(out, to // 2, get_i64(x, at // 2))
            to = _put(out, to, step, broadcast_i32(simd.atomic_load(out, to // 2) >> 7))
            simd.atomic_store(out, to // 2 + 3, get_i64(x, at // 2))
            to += step
            ints, reals = simd.registers_i32(count), simd.registers_f32(count)
            for i in range(count):
                simd.put(ints, i, load_i32(x, at) + broadcast_i32(i))
                simd.put(reals, i, simd.float_of(simd.get(ints, i)))
            total, sum_of = simd.zero_i32(), simd.zero_f32()
            for i in range(count):
                total = total * broadcast_i32(3) + simd.get(ints, count - 1 - i)
                sum_of = sum_of * broadcast_f32(np.float32(3)) + simd.get(reals, count - 1 - i)
            to = _put(out, to, step, total)
            to = _put(out, to, step, int_bits(sum_of))
            to = _put(out, to, step, _apart(_apart(load_i32(x, at))))

    return run


@kernel
def half_ops() -> Any:
    """`load_f16` of consecutive vectors."""

    def run(table):  # type: ignore[no-untyped-def]
        for at in range(0, 16 * get_i64(table, VECTORS), 16):
            store_i32(get_i64(table, OUT), at, int_bits(simd_int.load_f16(get_i64(table, FIRST), at)))

    return run


def results(made: Kernel, names: list[str], first: np.ndarray, second: np.ndarray, vectors: int) -> dict[str, np.ndarray]:
    """What a kernel gives: for each intrinsic int32 [vectors, 16]; words that a partial store leaves alone are -1."""
    out = np.full((len(names), vectors, 16), -1, np.int32)
    table = Table(4, 1)
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64)(made.address)
    run(table.set(vectors, first.ctypes.data, second.ctypes.data, out.ctypes.data))
    return dict(zip(names, out, strict=True))


def floats(seed: int) -> np.ndarray:
    """f32 [384, 16]: special values in every combination of lanes, all magnitudes, halves between integers, normal values."""
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, -1e-39, 3.4e38, -3.4e38, 2.0**31, -(2.0**31), 0.5, -1.5, 126.5])
    bits = rng.integers(0, 1 << 32, 2048, dtype=np.uint32).view(np.float32)
    halves = rng.integers(-300, 300, 1024).astype(np.float32) / 2
    parts = rng.choice(special, 1024).astype(np.float32), bits, halves, rng.standard_normal(2048).astype(np.float32) * 50
    return np.ascontiguousarray(np.concatenate(parts).reshape(-1, 16))


def integers(seed: int) -> np.ndarray:
    """i32 [384, 16]: random words, bytes and halves from the ends of their ranges, and equal vectors in places."""
    rng = np.random.default_rng(seed)
    words = rng.integers(-(1 << 31), 1 << 31, 2048, dtype=np.int64).astype(np.int32)
    ends = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), 8192).view(np.int32)
    halves = rng.choice(np.array([-32768, -1, 0, 32767], np.int16), 2048).view(np.int32)
    same = np.repeat(np.arange(-32, 32, dtype=np.int32), 16)
    return np.concatenate([words, ends, halves, same]).reshape(-1, 16)


def bytes_of(seed: int) -> np.ndarray:
    """1024 random bytes."""
    return np.random.default_rng(seed).integers(0, 256, 1024, dtype=np.uint8)


def everything() -> dict[str, np.ndarray]:
    """All results, named `kernel.intrinsic`."""
    memory = bytes_of(7)
    runs = {
        "float": (float_ops(), FLOAT, floats(0), floats(1), 384),
        "integer": (integer_ops(), INTEGER, integers(2), integers(3), 384),
        "memory": (memory_ops(), MEMORY, memory, memory, 300),
        "state": (state_ops(COUNT), STATE, integers(4), memory, 384),
        "half": (half_ops(), ["load_f16"], np.arange(1 << 16, dtype=np.uint16), memory, 4096),
    }
    return {f"{name}.{key}": value for name, run in runs.items() for key, value in results(*run).items()}


def checksum(words: np.ndarray) -> str:
    """A hash of the words in which all NaNs of f32 are one: which of two NaNs an addition passes on is not settled."""
    numbers = words.view(np.float32)
    return hashlib.sha256(np.where(np.isnan(numbers), np.float32(np.nan), numbers).tobytes()).hexdigest()


if __name__ == "__main__":
    print("isa", current_isa().name)
    for intrinsic, words in everything().items():
        print(intrinsic, checksum(words))
