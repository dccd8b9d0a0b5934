"""Scalar float helpers that LLVM turns into vector code: bit casts, an order-preserving integer key, exp, log.

All are plain multiply and add without fused operations, so that a vector lane, a loop tail and another machine give the same bits.
"""

# mypy: disable-error-code="arg-type, return-value, misc, assignment, call-arg, var-annotated"
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

f32, i32, u32 = np.float32, np.int32, np.uint32

BLOCK = 64  # entries handled per inner loop: four AVX-512 registers, and short enough that skipping a block saves work
KEY_NEG_INF = -2139095041  # order_key(-inf)
KEY_POS_INF = 0x7F800000  # order_key(+inf)


@intrinsic
def float_bits(context: Any, value: Any) -> Any:
    """Bits of a float32 as int32."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def bits_float(context: Any, value: Any) -> Any:
    """The float32 with the given int32 bits."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


@njit(inline="always")
def order_key(x: float) -> int:
    """An int32 that orders as the floats do (0.0 and -0.0 equal). NaN lies above +inf or below -inf, by its sign."""
    b = float_bits(f32(x + f32(0)))  # adding zero turns -0.0 into 0.0
    return i32(b ^ i32(i32(b >> i32(31)) & i32(0x7FFFFFFF)))


@njit(inline="always")
def key_float(k: int) -> float:
    """Inverse of ``order_key``."""
    return bits_float(i32(k ^ i32(i32(k >> i32(31)) & i32(0x7FFFFFFF))))


@njit(inline="always")
def log_ratio(m: float, k: float) -> float:
    """log((1 + m) * 2**k) for m in [-0.30, 0.42]: the series of log(1 + m), minimax over the interval (Cephes' logf)."""
    y = f32(7.0376836292e-2)
    y = f32(y * m + f32(-1.1514610310e-1))
    y = f32(y * m + f32(1.1676998740e-1))
    y = f32(y * m + f32(-1.2420140846e-1))
    y = f32(y * m + f32(1.4249322787e-1))
    y = f32(y * m + f32(-1.6668057665e-1))
    y = f32(y * m + f32(2.0000714765e-1))
    y = f32(y * m + f32(-2.4999993993e-1))
    y = f32(y * m + f32(3.3333331174e-1))
    square = f32(m * m)
    y = f32(f32(y * m) * square)
    y = f32(y + k * f32(-2.12194440e-4))
    y = f32(y - f32(0.5) * square)
    return f32(f32(m + y) + k * f32(0.693359375))


@njit(inline="always")
def split(x: float) -> tuple[float, float]:
    """(m, k) with x = (1 + m) * 2**k and 1 + m in [sqrt(1/2), sqrt(2)); x positive and normal."""
    b = i32(float_bits(f32(x)) - i32(0x3F3504F3))
    k = i32(b >> i32(23))
    m = bits_float(i32(i32(b & i32(0x7FFFFF)) + i32(0x3F3504F3)))
    return f32(m - f32(1)), f32(k)


@njit(inline="always")
def exp_neg(x: float) -> float:
    """exp(x) for x <= 0, relative error 1e-7; 0 below -87."""
    c = f32(x) if x > f32(-87) else f32(-87)
    n = np.floor(f32(c * f32(1.44269504) + f32(0.5)))
    r = f32(f32(c - n * f32(0.693359375)) - n * f32(-2.12194440e-4))
    y = f32(1.9875691500e-4)
    y = f32(y * r + f32(1.3981999507e-3))
    y = f32(y * r + f32(8.3334519073e-3))
    y = f32(y * r + f32(4.1665795894e-2))
    y = f32(y * r + f32(1.6666665459e-1))
    y = f32(y * r + f32(5.0000001201e-1))
    y = f32(f32(f32(y * r) * r + r) + f32(1))
    scaled = f32(y * bits_float(i32(i32(i32(n) + i32(127)) << i32(23))))
    return scaled if x >= f32(-87) else f32(0)


@njit(inline="always")
def block_sum(buffer: Any) -> float:
    """Sum of a BLOCK-long float32 buffer by halving (a fixed tree); destroys it."""
    for j in range(32):
        buffer[j] += buffer[j + 32]
    for j in range(16):
        buffer[j] += buffer[j + 16]
    for j in range(8):
        buffer[j] += buffer[j + 8]
    total = f32(0)
    for j in range(8):
        total = f32(total + buffer[j])
    return total
