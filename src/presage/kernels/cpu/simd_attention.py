"""Register tiles of attention: vector code over raw addresses, unrolled while it is emitted.

A tile keeps ``mr`` query rows in registers: ``qk_tile`` makes mr x 32 scores of one block of keys, ``pv_tile`` adds 32 keys to mr x (16 nc)
outputs. Sizes are literals, so each accumulator is one register from the start and one function serves all shapes.
All arithmetic is explicit (fma where written, nothing contracted), keys and dimensions ascending: the bits of a row never depend on the
tile that computed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.vectors import FLOAT, I1, I8, I16, I32, I64, VF32, VI16, VI32, mask16

HIDDEN = -1.0
"""Stands in the scratch for the weight of a key that a row must not see (a real weight is never negative)."""

# llvmlite has no type stubs.
Builder: TypeAlias = Any
Value: TypeAlias = Any


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite lacks; only used to name the operands of the dot instruction."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _const(ty: ir.Type, value: Any) -> ir.Constant:
    return ir.Constant(ty, [value] * ty.count) if isinstance(ty, ir.VectorType) else ir.Constant(ty, value)


_ZERO = _const(VF32, 0.0)


def _at(b: Builder, base: Value, off: Any, ty: ir.Type) -> Value:
    off = _const(I64, off) if isinstance(off, int) else off
    return b.inttoptr(b.add(base, off), ty.as_pointer())


def _load(b: Builder, base: Value, off: Any, ty: ir.Type, align: int = 4) -> Value:
    value = b.load(_at(b, base, off, ty))
    value.align = align
    return value


def _store(b: Builder, value: Value, base: Value, off: Any) -> None:
    b.store(value, _at(b, base, off, value.type)).align = 4


def _splat(b: Builder, scalar: Value, ty: ir.VectorType) -> Value:
    undef = ir.Constant(ty, ir.Undefined)
    one = b.insert_element(undef, scalar, _const(I32, 0))
    return b.shuffle_vector(one, undef, _const(ir.VectorType(I32, ty.count), 0))


def _call(b: Builder, name: str, ret: ir.Type, args: list[Value]) -> Value:
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ret, [a.type for a in args]), name), args)


def _fma(b: Builder, x: Value, y: Value, acc: Value) -> Value:
    return _call(b, "llvm.fma.v16f32", VF32, [x, y, acc])


def _prefetch(b: Builder, base: Value, off: Any) -> None:
    """Fetch into the second-level cache: the first one has too few miss buffers to stream (12 against 20 GB/s measured on Zen 4)."""
    _call(b, "llvm.prefetch.p0", ir.VoidType(), [_at(b, base, off, I8), _const(I32, 0), _const(I32, 2), _const(I32, 1)])


def _stored(b: Builder, base: Value, off: Any, half: int) -> Value:
    """16 stored elements (bf16 if ``half``) as f32, exactly."""
    if not half:
        return _load(b, base, off, VF32)
    return b.bitcast(b.shl(b.zext(_load(b, base, off, VI16, 2), VI32), _const(VI32, 16)), VF32)


def _dot_pairs(b: Builder, acc: Value, k: Value, q: Value, native: bool) -> Value:
    """acc + k.even * q.even + k.odd * q.odd per lane, for bf16 pairs held as i32."""
    if native:
        pair = ir.VectorType(_BFloat(), 32)
        return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF32, [acc, b.bitcast(k, pair), b.bitcast(q, pair)])
    s16, high = _const(VI32, 16), _const(VI32, 0xFFFF0000)
    acc = _fma(b, b.bitcast(b.shl(k, s16), VF32), b.bitcast(b.shl(q, s16), VF32), acc)
    return _fma(b, b.bitcast(b.and_(k, high), VF32), b.bitcast(b.and_(q, high), VF32), acc)


def _registers(b: Builder, first: list[Value]) -> list[Value]:
    """Stack slots with first values; LLVM keeps them in registers."""
    slots = [cgutils.alloca_once(b, v.type) for v in first]
    for slot, value in zip(slots, first, strict=True):
        b.store(value, slot)
    return slots


def _emit(signature: Any, body: Callable[[Builder, list[Value]], Any]) -> Any:
    """Adapt ``body(builder, args)`` to numba's code generator protocol (None becomes numba's void)."""

    def generate(context: Any, builder: Builder, sig: Any, args: list[Value]) -> Any:
        value = body(builder, args)
        return context.get_dummy_value() if value is None else value

    return signature, generate


def _mask_of(typingctx: Any, bits: Any) -> Any:
    """The low 16 bits of an int64 as a mask, bit i for lane i."""
    return _emit(mask16(types.int64), lambda b, args: b.bitcast(b.trunc(args[0], I16), ir.VectorType(I1, 16)))


def _qk_tile(typingctx: Any, mr: Any, half: Any, q: Any, q_stride: Any, k: Any, steps: Any, out: Any, ahead: Any) -> Any:
    """out[r, 0:32] = q[r] . k[:, 0:32] for mr rows (strides in bytes). ``steps`` is D/2 pairs if ``half`` (bf16), else D (f32).

    ``ahead`` is the address of the block to prefetch, line by line while this one is read.
    """
    rows, bf16, native = mr.literal_value, half.literal_value, current_isa().bf16_dot

    def body(b: Builder, args: list[Value]) -> None:
        _, _, q, q_stride, k, steps, out, ahead = args
        acc = _registers(b, [_ZERO] * (2 * rows))
        base = [b.add(q, b.mul(q_stride, _const(I64, r))) for r in range(rows)]
        ty = VI32 if bf16 else VF32
        with cgutils.for_range(b, steps, intp=I64) as loop:
            off, q_off = b.mul(loop.index, _const(I64, 128)), b.mul(loop.index, _const(I64, 4))
            keys = []
            for j in range(2):
                side = _const(I64, 64 * j)
                _prefetch(b, b.add(ahead, side), off)
                keys.append(_load(b, b.add(k, side), off, ty))
            for r in range(rows):
                x = _splat(b, _load(b, base[r], q_off, ty.element), ty)
                for j in range(2):
                    a = acc[2 * r + j]
                    b.store(_dot_pairs(b, b.load(a), keys[j], x, native) if bf16 else _fma(b, keys[j], x, b.load(a)), a)
        for i, a in enumerate(acc):
            _store(b, b.load(a), out, 64 * i)

    return _emit(types.void(mr, half, *[types.int64] * 6), body)


def _pv_key(b: Builder, weight: Value, v: list[Value], regs: list[Value], total: Value, masked: int) -> None:
    """One key for one row: the sum and the columns grow by its weight, or stay as they are if the row does not see it."""
    x = _splat(b, weight, VF32)
    grown = b.fadd(b.load(total), weight)
    if masked:
        seen = b.fcmp_unordered(">=", x, _ZERO)
        grown = b.select(b.fcmp_unordered(">=", weight, _const(FLOAT, 0.0)), grown, b.load(total))
    b.store(grown, total)
    for reg, column in zip(regs, v, strict=True):
        old = b.load(reg)
        new = _fma(b, x, column, old)
        b.store(b.select(seen, new, old) if masked else new, reg)


def _pv_tile(typingctx, mr, nc, half, masked, p, v, stride, keys, acc, acc_stride, sums, ahead):  # type: ignore[no-untyped-def]
    """acc[r, :16 nc] += p[r, k] v[k, :16 nc] and sums[r] += p[r, k], ``keys`` keys in order; ``masked`` skips HIDDEN weights per row.

    ``stride`` (of v) and ``acc_stride`` are bytes; rows of p are 32 f32 apart; ``ahead`` has v's shape and is prefetched.
    """
    m, n, bf16, mask = (x.literal_value for x in (mr, nc, half, masked))
    step = 32 if bf16 else 64

    def body(b: Builder, args: list[Value]) -> None:
        p, v, stride, keys, acc, acc_stride, sums, ahead = args[4:]
        base = [b.add(acc, b.mul(acc_stride, _const(I64, r))) for r in range(m)]
        regs = [_registers(b, [_load(b, row, 64 * c, VF32) for c in range(n)]) for row in base]
        totals = _registers(b, [_load(b, sums, 4 * r, FLOAT) for r in range(m)])
        with cgutils.for_range(b, keys, intp=I64) as loop:
            v_off, p_off = b.mul(loop.index, stride), b.mul(loop.index, _const(I64, 4))
            for line in range(0, n * step, 64):
                _prefetch(b, b.add(ahead, _const(I64, line)), v_off)
            columns = [_stored(b, b.add(v, _const(I64, step * c)), v_off, bf16) for c in range(n)]
            for r in range(m):
                weight = _load(b, b.add(p, _const(I64, 128 * r)), p_off, FLOAT)
                _pv_key(b, weight, columns, regs[r], totals[r], mask)
        for r in range(m):
            _store(b, b.load(totals[r]), sums, 4 * r)
            for c in range(n):
                _store(b, b.load(regs[r][c]), base[r], 64 * c)

    return _emit(types.void(mr, nc, half, masked, *[types.int64] * 8), body)


# Typed as Any: for a type checker the builders' first parameter, which callers do not pass, would be missing in every call.
mask_of: Any = intrinsic(_mask_of)
qk_tile: Any = intrinsic(prefer_literal=True)(_qk_tile)
pv_tile: Any = intrinsic(prefer_literal=True)(_pv_tile)
