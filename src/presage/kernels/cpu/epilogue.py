"""What happens to an output between the accumulators and memory: bias, cap, activation, gate, row weight, residual.

Elementwise and in one fixed order, so it adds nothing to the question of a row's bits:
value = acc + bias; cap * tanh(value / cap); act(value), or act(gate) * up; * row scale; stored, or added to what is there.
"""

from __future__ import annotations

from functools import lru_cache

from presage.core.errors import ConfigError
from presage.kernels.cpu.cache import device, subroutine
from presage.kernels.cpu.simd import (
    broadcast_f32,
    first_lanes,
    load_f32,
    load_f32_n,
    outlined,
    select,
    store_bf16,
    store_bf16_n,
    store_f32,
    store_f32_n,
    zero_f32,
)
from presage.kernels.cpu.simdmath import gelu, gelu_tanh, silu, softcap

NONE, SILU, GELU_TANH, GELU = 0, 1, 2, 3
STORE_F32, STORE_BF16, ADD_F32 = 0, 1, 2


_CODES = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU}


@lru_cache(maxsize=64)
def activation_code(act: str | None) -> tuple[int, bool]:
    """(code, gated) of an activation's name: `None`, `silu`, `gelu_tanh`, `gelu`, each also as `..._mul`. Raises ConfigError."""
    if act is None:
        return NONE, False
    name = act.removesuffix("_mul")
    if name not in _CODES:
        raise ConfigError(f"unknown activation {act!r}; known: {', '.join(_CODES)} and each with _mul", param="act")
    return _CODES[name], act.endswith("_mul")


@subroutine
def activate(code, x):  # type: ignore[no-untyped-def]
    """The activation `code` of 16 values."""
    outlined()
    if code == SILU:
        return silu(x)
    if code == GELU_TANH:
        return gelu_tanh(x)
    if code == GELU:
        return gelu(x)
    return x


@subroutine
def cap_value(x, cap):  # type: ignore[no-untyped-def]
    """cap * tanh(x / cap) for a scalar cap."""
    outlined()
    return softcap(x, broadcast_f32(cap))


@device
def add_bias(x, bias, column, count):  # type: ignore[no-untyped-def]
    """x + bias[column : column + count]; `bias` is an address or 0."""
    if bias == 0:
        return x
    return x + load_f32_n(bias, column, count)


@device
def put_row(out, offset, value, count, mode):  # type: ignore[no-untyped-def]
    """Store the first `count` lanes at element `offset` of the address `out`, in the given mode."""
    if count >= 16:
        if mode == STORE_BF16:
            store_bf16(out, offset, value)
        elif mode == ADD_F32:
            store_f32(out, offset, load_f32(out, offset) + value)
        else:
            store_f32(out, offset, value)
    elif mode == STORE_BF16:
        store_bf16_n(out, offset, value, count)
    elif mode == ADD_F32:
        # Lanes beyond the row hold the other half of a gated pair: keep them out of the sum, they may be inf.
        store_f32_n(out, offset, load_f32_n(out, offset, count) + select(first_lanes(count), value, zero_f32()), count)
    else:
        store_f32_n(out, offset, value, count)
