"""Register tiles of attention: vector code over raw addresses, unrolled while it is emitted.

A tile keeps ``mr`` query rows in registers: `qk_tile` makes mr x 32 scores of one block of keys, `pv_tile` adds 32 keys to mr x (16 nc)
outputs. Sizes are literals, so each accumulator is one register from the start and one function serves all shapes.

*Kinds* of caches are numbers: 0 f32, 1 bf16, 2 int8. Scores of bf16 are dots of pairs of dimensions, of int8 integer dots of four. Values
are multiplied key by key in f32, else as pairs of keys in bf16: the earlier key of a pair lies in the high half of a word, which the
instruction adds first, so that the sum runs in the order of the keys and a pair with one hidden key adds the other alone.

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
from presage.kernels.cpu.simd import _VBF16, _call, _const, _dot_bf16, _dot_u8s8, _round_bf16, _simple, _splat, _store
from presage.kernels.cpu.vectors import FLOAT, I8, I16, I32, I64, LANES, VF32, VI1, VI16, VI16X2, VI32, f32x16, i32x16, mask16

F32, BF16, INT8 = range(3)
HEAD = 128
"""Bytes before the codes of 32 tokens of one head in an int8 block: their scales, f32."""

# llvmlite has no type stubs.
Builder: TypeAlias = Any
Value: TypeAlias = Any


def _offset(off: Any) -> Value:
    return ir.Constant(I64, off) if isinstance(off, int) else off


def _at(b: Builder, base: Value, off: Any, ty: ir.Type) -> Value:
    return b.inttoptr(b.add(base, _offset(off)), ty.as_pointer())


def _load(b: Builder, base: Value, off: Any, ty: ir.Type, align: int = 4) -> Value:
    value = b.load(_at(b, base, off, ty))
    value.align = align
    return value


def _put(b: Builder, value: Value, base: Value, off: Any) -> None:
    b.store(value, _at(b, base, off, value.type)).align = 4


def _prefetch(b: Builder, base: Value, off: Any) -> None:
    """Fetch into the second-level cache: the first one has too few miss buffers to stream (12 against 20 GB/s measured on Zen 4)."""
    _call(b, "llvm.prefetch.p0", ir.VoidType(), _at(b, base, off, I8), *(ir.Constant(I32, v) for v in (0, 2, 1)))


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


def _fma(b: Builder, acc: Value, x: Value, y: Value) -> Value:
    return _call(b, "llvm.fma.v16f32", VF32, x, y, acc)


_DOTS = {F32: _fma, BF16: _dot_bf16, INT8: _dot_u8s8}
"""What one 4-byte step along the dimensions adds: 1, 2 or 4 products a lane."""


# ---- scores -----------------------------------------------------------------------------------------------------------
def _first_dots(b: Builder, base: Value, steps: Value, kind: int) -> Value:
    """What a row's dots start from: codes of keys are stored plus 128, so int8 rows bring -128 times the sum of their own."""
    if kind != INT8:
        return _const(VF32, 0.0)
    return _splat(b, _load(b, base, b.mul(steps, _offset(4)), I32), VI32)


def _qk_tile(typingctx, mr, kind, fetch, q, q_stride, k, steps, out, biggest, ahead):  # type: ignore[no-untyped-def]
    """out[r, 0:32] = q[r] . k[:, 0:32] for mr rows, and biggest[r, 0:16] grows with them (strides in bytes, 128 and 64 for these two).

    ``steps``: words of a row, D (f32), D/2 pairs (bf16) or D/4 (int8, whose dots are multiplied by the scales before k). ``ahead``: the
    next block, prefetched line by line while this one is read if ``fetch``.
    """
    rows, stored, fetching = (x.literal_value for x in (mr, kind, fetch))
    ty = VF32 if stored == F32 else VI32

    def body(b: Builder, args: list[Value]) -> None:
        q, q_stride, k, steps, out, biggest, ahead = args[3:]
        base = [b.add(q, b.mul(q_stride, _offset(r))) for r in range(rows)]
        start = [_first_dots(b, row, steps, stored) for row in base]
        acc = _registers(b, [start[i // 2] for i in range(2 * rows)])
        with cgutils.for_range(b, steps, intp=I64) as loop:
            off, q_off = b.mul(loop.index, _offset(128)), b.mul(loop.index, _offset(4))
            keys = []
            for j in range(2):
                if fetching:
                    _prefetch(b, b.add(ahead, _offset(64 * j)), off)
                keys.append(_load(b, b.add(k, _offset(64 * j)), off, ty))
            for r in range(rows):
                x = _splat(b, _load(b, base[r], q_off, ty.element), ty)
                for j in range(2):
                    a = acc[2 * r + j]
                    b.store(_DOTS[stored](b, b.load(a), keys[j], x), a)
        scales = [_load(b, k, 64 * j - HEAD, VF32) for j in range(2)] if stored == INT8 else []
        for r in range(rows):
            top = _load(b, biggest, 64 * r, VF32)
            for j in range(2):
                dots = b.load(acc[2 * r + j])
                if stored == INT8:
                    dots = b.fmul(b.sitofp(dots, VF32), scales[j])
                top = b.select(b.fcmp_ordered(">", dots, top), dots, top)
                _put(b, dots, out, 128 * r + 64 * j)
            _put(b, top, biggest, 64 * r)

    return _emit(types.void(mr, kind, fetch, *[types.int64] * 7), body)


# ---- weights as pairs of keys -----------------------------------------------------------------------------------------
_BOTH = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))


def _earlier_high(b: Builder, halves: Value) -> Value:
    """32 16-bit numbers as 16 words, the first of each two in the high half."""
    words, s16 = b.bitcast(halves, VI32), _const(VI32, 16)
    return b.or_(b.shl(words, s16), b.lshr(words, s16))


def _pair_weights(b: Builder, first: Value, second: Value) -> Value:
    if current_isa().bf16_dot:
        # What the instruction does to denormals (zero) it does to its operands in the dot as well.
        rounded = _call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _VBF16, second, first)
        return _earlier_high(b, rounded)
    halves = [b.trunc(_round_bf16(b, x), VI16) for x in (first, second)]
    return _earlier_high(b, b.shuffle_vector(*halves, _BOTH))


def _pair_masks(b: Builder, first: Value, second: Value) -> Value:
    return _earlier_high(b, b.sext(b.shuffle_vector(first, second, _BOTH), VI16X2))


def _pair_codes(b: Builder, earlier: Value, later: Value) -> Value:
    # An int8 as f32 has nothing in its low half: cut off, it is a bf16.
    high, low = (b.bitcast(b.sitofp(x, VF32), VI32) for x in (earlier, later))
    return b.or_(high, b.lshr(low, _const(VI32, 16)))


pair_weights = _simple("pair_weights", "32 f32 as 16 pairs of bf16, the earlier of each in the high half.", i32x16, (f32x16,) * 2, _pair_weights)
pair_masks = _simple("pair_masks", "32 booleans as 16 pairs of 16 bits, in the order of `pair_weights`.", i32x16, (mask16,) * 2, _pair_masks)
pair_codes = _simple("pair_codes", "int8 numbers of two keys as pairs of bf16, exactly.", i32x16, (i32x16,) * 2, _pair_codes)
word_mask = _simple("word_mask", "16 booleans as words of all or no bits.", i32x16, (mask16,), lambda b, m: b.sext(m, VI32))
mask_of = _simple(
    "mask_of", "The low 16 bits of an int64, bit i for lane i.", mask16, (types.int64,), lambda b, x: b.bitcast(b.trunc(x, I16), VI1)
)
set_u16 = _store("set_u16", "Scalar int64 stored as 16 bits.", 2, I16, types.int64, lambda b, v: b.trunc(v, I16))


# ---- powers of two ----------------------------------------------------------------------------------------------------
_MAGIC = _const(VF32, 12582912.0)
"""1.5 * 2**23: what is added to it is rounded to an integer that stands in the low bits."""


def _scalable(b: Builder, x: Value) -> Value:
    least = _const(VF32, -126.0)
    return x if current_isa().bits == 512 else b.select(b.fcmp_ordered(">", least, x), least, x)


def _whole(b: Builder, x: Value) -> Value:
    if current_isa().bits == 512:
        return _call(b, "llvm.roundeven.v16f32", VF32, x)
    return b.fsub(b.fadd(x, _MAGIC), _MAGIC)


def _times_power(b: Builder, x: Value, n: Value) -> Value:
    if current_isa().bits == 512:
        mask, rounding = ir.Constant(I16, -1), ir.Constant(I32, 4)
        return _call(b, "llvm.x86.avx512.mask.scalef.ps.512", VF32, x, n, _const(VF32, 0.0), mask, rounding)
    # The exponent is added as an integer; a NaN (whose low bits are zero) stays one.
    power = b.shl(b.bitcast(b.fadd(n, _MAGIC), VI32), _const(VI32, 23))
    return b.bitcast(b.add(b.bitcast(x, VI32), power), VF32)


scalable = _simple("scalable", "f32 <= 0, not below what `times_power` can do: -126, or anything at all.", f32x16, (f32x16,), _scalable)
whole = _simple("whole", "f32 in -2**22..0 (where one instruction does it: any) to integers in f32, nearest even.", f32x16, (f32x16,), _whole)
times_power = _simple("times_power", "x * 2**n for x in [0.5, 2) and integers n that `whole` gives.", f32x16, (f32x16,) * 2, _times_power)


# ---- outputs ----------------------------------------------------------------------------------------------------------
def _values(b: Builder, v: Value, off: Value, count: int, stride: Value, kind: int) -> list[Value]:
    """The words of one step of ``count`` times 16 columns; int8 tokens lie ``stride`` bytes apart and become a pair."""
    if kind != INT8:
        return [_load(b, b.add(v, _offset(64 * c)), off, VI32) for c in range(count)]
    words = []
    for c in range(count):
        places = [b.add(v, _offset(16 * c)), b.add(b.add(v, _offset(16 * c)), stride)]
        words.append(_pair_codes(b, *(b.sext(_load(b, place, off, ir.VectorType(I8, LANES), 1), VI32) for place in places)))
    return words


def _pv_tile(typingctx, mr, nc, kind, masked, fetch, p, w, v, dim, acc, sums, masks, ahead):  # type: ignore[no-untyped-def]
    """acc[r, :16 nc] += w[r, :] v[:, :16 nc] and sums[r] += p[r, :] over the 32 keys of a block, in their order.

    A step is one key (f32; rows of w and masks are 128 bytes apart) or a pair (16 words, 64 bytes apart). p holds weights as f32, 128 bytes
    a row. Hidden keys have weight 0 and zero ``masks``: where ``masked``, a value is set to zero before it is multiplied, whatever it holds.
    ``dim``: columns of v and of acc. ``ahead`` has v's shape and is prefetched if ``fetch``.
    """
    m, n, stored, mask, fetching = (x.literal_value for x in (mr, nc, kind, masked, fetch))
    ty, steps, row_bytes = (VF32, 32, 128) if stored == F32 else (VI32, 16, 64)

    def body(b: Builder, args: list[Value]) -> None:
        p, w, v, dim, acc, sums, masks, ahead = args[5:]
        row, step = b.mul(dim, _offset(4)), b.mul(dim, _offset(2 if stored == INT8 else 4))
        base = [b.add(acc, b.mul(row, _offset(r))) for r in range(m)]
        regs = [_registers(b, [_load(b, start, 64 * c, VF32) for c in range(n)]) for start in base]
        totals = _registers(b, [_load(b, sums, 4 * r, FLOAT) for r in range(m)])
        with cgutils.for_range(b, _offset(steps), intp=I64) as loop:
            v_off, w_off, p_off = b.mul(loop.index, step), b.mul(loop.index, _offset(4)), b.mul(loop.index, _offset(128 // steps))
            for line in range(0, n * (32 if stored == INT8 else 64) if fetching else 0, 64):
                _prefetch(b, b.add(ahead, _offset(line)), v_off)
            columns = _values(b, v, v_off, n, dim, stored)
            for r in range(m):
                at = b.add(w_off, _offset(row_bytes * r))
                weight = _splat(b, _load(b, w, at, ty.element), ty)
                shown = _splat(b, _load(b, masks, at, I32), VI32) if mask else None
                for key in range(32 // steps):
                    b.store(b.fadd(b.load(totals[r]), _load(b, p, b.add(p_off, _offset(128 * r + 4 * key)), FLOAT)), totals[r])
                for reg, column in zip(regs[r], columns, strict=True):
                    x = b.and_(column, shown) if mask else column
                    b.store((_fma if stored == F32 else _dot_bf16)(b, b.load(reg), b.bitcast(x, ty), weight), reg)
        for r in range(m):
            _put(b, b.load(totals[r]), sums, 4 * r)
            for c in range(n):
                _put(b, b.load(regs[r][c]), base[r], 64 * c)

    return _emit(types.void(mr, nc, kind, masked, fetch, *[types.int64] * 8), body)


# Typed as Any: for a type checker the builders' first parameter, which callers do not pass, would be missing in every call.
qk_tile: Any = intrinsic(prefer_literal=True)(_qk_tile)
pv_tile: Any = intrinsic(prefer_literal=True)(_pv_tile)
