"""Functions of 16 floats built from the intrinsics: exp, tanh, sigmoid and the activations of language models.

Plain adds, multiplies and fused multiply-adds in a fixed order: equal inputs give equal bits in every lane, on every machine
and at every place in a batch. Polynomials are our own least-maximum fits; tests/tiny/test_simd.py holds the error bounds.
"""

from __future__ import annotations

import numpy as np

from presage.kernels.cpu.cache import device
from presage.kernels.cpu.simd import (
    broadcast_f32,
    broadcast_i32,
    float_bits,
    fma,
    int_bits,
    maximum,
    minimum,
    select,
)


@device
def constant(value):  # type: ignore[no-untyped-def]
    """A float (of any precision) as f32 in all lanes."""
    return broadcast_f32(np.float32(value))


@device
def exp(x):  # type: ignore[no-untyped-def]
    """e**x to 1 ulp; 0 below -104, inf above 88.73, denormals gradual, NaN stays NaN."""
    # Operand order matters: `maximum` gives its second operand when one is NaN.
    x = maximum(constant(-105.0), minimum(constant(90.0), x))
    # Adding 1.5 * 2**23 leaves round(x / ln 2) in the low bits of the sum: no conversion that NaN could upset.
    shifted = fma(x, constant(1.44269504088896341), constant(12582912.0))
    n = shifted - constant(12582912.0)
    r = fma(n, constant(-0.693145751953125), x)
    r = fma(n, constant(-1.42860677044e-6), r)
    p = fma(constant(0.001395048825), r, constant(0.008368887796))
    p = fma(p, r, constant(0.04166620585))
    p = fma(p, r, constant(0.1666651885))
    p = fma(p, r, constant(0.5000000095))
    p = fma(p * r, r, r) + constant(1.0)
    # 2**n in two factors, because n runs from -151 to 130 and a float's exponent from -126 to 127.
    count = int_bits(shifted) - broadcast_i32(0x4B400000)
    half = ((count + broadcast_i32(512)) >> broadcast_i32(1)) - broadcast_i32(256)
    first = float_bits((half + broadcast_i32(127)) << broadcast_i32(23))
    second = float_bits((count - half + broadcast_i32(127)) << broadcast_i32(23))
    return p * first * second


@device
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e**-x), to 3 ulp."""
    return constant(1.0) / (constant(1.0) + exp(constant(0.0) - x))


@device
def tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent, to 3 ulp."""
    z = x * x
    p = fma(constant(-0.005717042344), z, constant(0.02065058494))
    p = fma(p, z, constant(-0.05374349738))
    p = fma(p, z, constant(0.1333149128))
    p = fma(p, z, constant(-0.3333328393))
    near = fma(p * z, x, x)
    far = constant(1.0) - constant(2.0) / (exp(x + x) + constant(1.0))
    return select(z < constant(0.390625), near, far)


@device
def silu(x):  # type: ignore[no-untyped-def]
    """x * sigmoid(x)."""
    return x / (constant(1.0) + exp(constant(0.0) - x))


@device
def gelu_tanh(x):  # type: ignore[no-untyped-def]
    """The tanh form of GELU: x / 2 * (1 + tanh u) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x**3)."""
    twice = x * fma(constant(0.07135481283), x * x, constant(1.595769121606))
    return x / (constant(1.0) + exp(constant(0.0) - twice))


@device
def gelu(x):  # type: ignore[no-untyped-def]
    """The exact GELU, x / 2 * erfc(-x / sqrt 2), with erfc y = e**(-y*y) * erfcx y fitted in 1 / (1 + 0.4 y)."""
    # Beyond 16 the tail is 0 in f32; the limit keeps squares finite.
    size = minimum(constant(16.0), maximum(constant(0.0) - x, x))
    t = constant(1.0) / fma(size, constant(0.28284271247461901), constant(1.0))
    p = fma(constant(-0.02959396457), t, constant(0.198011276))
    p = fma(p, t, constant(-0.498807141))
    p = fma(p, t, constant(0.5474299213))
    p = fma(p, t, constant(-0.2843623358))
    p = fma(p, t, constant(0.2720640292))
    p = fma(p, t, constant(0.12968032))
    p = fma(p, t, constant(0.2149189563))
    p = fma(p, t, constant(0.224952038))
    p = fma(p, t, constant(0.2257069085)) * t
    # Rounding the square would cost many ulp in the tail: put back what it lost, to first order.
    square = size * size
    lost = fma(size, size, constant(0.0) - square)
    power = exp(constant(-0.5) * square)
    tail = constant(0.5) * p * fma(power * constant(-0.5), lost, power)
    return select(x < constant(0.0), x * tail, x - x * tail)


@device
def softcap(x, cap):  # type: ignore[no-untyped-def]
    """cap * tanh(x / cap), Gemma's logit cap; `cap` is f32 in all lanes."""
    return cap * tanh(x / cap)
