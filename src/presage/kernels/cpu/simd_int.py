"""More vector intrinsics, for integer and quantised kernels: nibbles, table lookups, 16-bit dots, IEEE halves, rounding to int8.

Conventions as in `simd`. Every function gives the same bits on every instruction set. An `i32x16` also stands for 32 uint16 or
64 bytes, in memory order.

    q = load_i32(weights, 0)                                           # 128 4-bit codes
    acc = dot_u7s8(acc, low_nibbles(q), splat_load_i32(x, 0))          # with four int8 of a row of activations
    acc = dot_u7s8(acc, high_nibbles(q), splat_load_i32(x, 1))         # and with the next four
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.simd import _call, _const, _dot_u8s8, _load, _simple, _tree, in_parts, madd_i16, piece
from presage.kernels.cpu.vectors import I32, I64, LANES, VF32, VI8, VI16, VI16X2, VI32, f32x16, i32x16

_HALVES = ir.VectorType(ir.HalfType(), LANES)


# ---- IEEE halves ------------------------------------------------------------------------------------------------------
def _widen_f16(builder: Any, halves: Any) -> Any:
    if current_isa().bits or current_isa().neon:
        return builder.fpext(builder.bitcast(halves, _HALVES), VF32)
    # Portable: without the instruction LLVM would call a function of the compiler's run-time library per lane.
    bits = builder.zext(halves, VI32)
    magnitude = builder.and_(bits, _const(VI32, 0x7FFF))
    moved = builder.shl(magnitude, _const(VI32, 13))
    normal = builder.add(moved, _const(VI32, 112 << 23))
    denormal = builder.bitcast(builder.fmul(builder.sitofp(magnitude, VF32), _const(VF32, 2.0**-24)), VI32)
    quiet = builder.or_(moved, _const(VI32, 0x7FC00000))
    special = builder.select(builder.icmp_unsigned(">", magnitude, _const(VI32, 0x7C00)), quiet, _const(VI32, 0x7F800000))
    value = builder.select(builder.icmp_unsigned("<", magnitude, _const(VI32, 0x400)), denormal, normal)
    value = builder.select(builder.icmp_unsigned(">=", magnitude, _const(VI32, 0x7C00)), special, value)
    sign = builder.shl(builder.and_(bits, _const(VI32, 0x8000)), _const(VI32, 16))
    return builder.bitcast(builder.or_(value, sign), VF32)


load_f16 = _load(
    "load_f16", "16 IEEE halves widened to f32, exactly, denormals too; NaNs become quiet.", 2, VI16, f32x16, _widen_f16
)


# ---- bytes and nibbles ------------------------------------------------------------------------------------------------
def _low_nibbles(builder: Any, value: Any) -> Any:
    return builder.and_(value, _const(VI32, 0x0F0F0F0F))


low_nibbles = _simple("low_nibbles", "The low nibble of each of 64 bytes, as a byte.", i32x16, (i32x16,), _low_nibbles)
high_nibbles = _simple(
    "high_nibbles",
    "The high nibble of each of 64 bytes, as a byte.",
    i32x16,
    (i32x16,),
    lambda b, x: _low_nibbles(b, b.lshr(x, _const(VI32, 4))),
)


def _repeat_quarter(builder: Any, value: Any, quarter: int) -> Any:
    lanes = [4 * quarter + lane % 4 for lane in range(LANES)]
    return builder.shuffle_vector(value, ir.Constant(VI32, ir.Undefined), ir.Constant(VI32, lanes))


def _shuffle_bytes(builder: Any, table: Any, index: Any) -> Any:
    """x86's byte shuffle within each 16 bytes; an index with its top bit set gives 0."""
    bits = current_isa().bits
    name = "llvm.x86.avx512.pshuf.b.512" if bits == 512 else "llvm.x86.avx2.pshuf.b"
    return in_parts(builder, name, bits, VI8, table, index)


def _search(builder: Any, table: Any, index: Any, entries: int) -> Any:
    """A lookup by comparing with every index in turn: vectors without an instruction for it."""
    kind, first = table.type, ir.Constant(table.type, ir.Undefined)
    found = first
    for entry in range(entries):
        lanes = ir.Constant(ir.VectorType(I32, kind.count), [entry] * kind.count)
        value = builder.shuffle_vector(table, first, lanes)
        found = builder.select(builder.icmp_unsigned("==", index, _const(kind, entry)), value, found) if entry else value
    return found


def _lookup_u8(builder: Any, table: Any, index: Any) -> Any:
    repeated = builder.bitcast(_repeat_quarter(builder, table, 0), VI8)
    index = builder.and_(builder.bitcast(index, VI8), _const(VI8, 15))
    if current_isa().bits:
        found = _shuffle_bytes(builder, repeated, index)
    elif current_isa().neon:
        found = in_parts(builder, "llvm.aarch64.neon.tbl1.v16i8", 128, VI8, repeated, index)
    else:
        found = _search(builder, repeated, index, 16)
    return builder.bitcast(found, VI32)


lookup_u8 = _simple(
    "lookup_u8",
    "`(table, index)`: 64 bytes, each the entry of the table's first 16 bytes that the index's low 4 bits name.",
    i32x16,
    (i32x16, i32x16),
    _lookup_u8,
)


def _permute_u16(builder: Any, table: Any, index: Any) -> Any:
    isa = current_isa()
    index = builder.bitcast(index, VI16X2)
    if isa.bits == 512:
        found = _call(builder, "llvm.x86.avx512.permvar.hi.512", VI16X2, builder.bitcast(table, VI16X2), index)
        return builder.bitcast(found, VI32)
    index = builder.and_(index, _const(VI16X2, 31))
    if not isa.bits and not isa.neon:
        return builder.bitcast(_search(builder, builder.bitcast(table, VI16X2), index, 32), VI32)
    # By bytes: entry i lies at 2i and 2i + 1.
    places = builder.bitcast(builder.add(builder.mul(index, _const(VI16X2, 0x0202)), _const(VI16X2, 0x0100)), VI8)
    if isa.neon:
        quarters = tuple(piece(builder, builder.bitcast(table, VI8), quarter, 4) for quarter in range(4))
        found = in_parts(builder, "llvm.aarch64.neon.tbl4.v16i8", 128, VI8, places, every=quarters)
    else:
        found = _permute_by_quarters(builder, table, places)
    return builder.bitcast(found, VI32)


def _permute_by_quarters(builder: Any, table: Any, places: Any) -> Any:
    """One byte shuffle for each 16 bytes of the table. Each gives 0 for places that lie elsewhere, so their results are joined by or."""
    found = _const(VI8, 0)
    for quarter in range(4):
        # 0x70 more sets the top bit of every place but 0..15, and leaves the low four bits as they are.
        inside = builder.add(builder.xor(places, _const(VI8, 16 * quarter)), _const(VI8, 0x70))
        part = builder.bitcast(_repeat_quarter(builder, table, quarter), VI8)
        found = builder.or_(found, _shuffle_bytes(builder, part, inside))
    return found


permute_u16 = _simple(
    "permute_u16",
    "`(table, index)`: 32 uint16, each the entry of the table that the low 5 bits of the uint16 in `index` name.",
    i32x16,
    (i32x16, i32x16),
    _permute_u16,
)


# ---- dot products -----------------------------------------------------------------------------------------------------
def _dot_u7s8(builder: Any, acc: Any, u: Any, s: Any) -> Any:
    isa = current_isa()
    u, s = builder.bitcast(u, VI8), builder.bitcast(s, VI8)
    if isa.dotprod and not isa.i8mm:  # NEON: not run yet
        return in_parts(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", 128, VI32, acc, u, s)
    if isa.vnni or not isa.bits:
        return _dot_u8s8(builder, acc, u, s)
    # Two products of at most 127 * 128 fit the 16 bits to which this instruction saturates.
    name = "llvm.x86.avx512.pmaddubs.w.512" if isa.bits == 512 else "llvm.x86.avx2.pmadd.ub.sw"
    return builder.add(acc, madd_i16(builder, in_parts(builder, name, isa.bits, VI16X2, u, s), _const(VI16X2, 1)))


dot_u7s8 = _simple(
    "dot_u7s8",
    "As `dot_u8s8` for u <= 127 (4-bit codes), cheaper where there is no VNNI; larger u give something unspecified.",
    i32x16,
    (i32x16, i32x16, i32x16),
    _dot_u7s8,
)


def _dot_i16(builder: Any, acc: Any, x: Any, y: Any) -> Any:
    isa = current_isa()
    x, y = builder.bitcast(x, VI16X2), builder.bitcast(y, VI16X2)
    if isa.vnni:
        return in_parts(builder, f"llvm.x86.avx512.vpdpwssd.{isa.bits}", isa.bits, VI32, acc, x, y)
    return builder.add(acc, madd_i16(builder, x, y))


dot_i16 = _simple(
    "dot_i16", "acc + sum of 2 products of int16 per lane, exact (modulo 2^32).", i32x16, (i32x16, i32x16, i32x16), _dot_i16
)


# ---- quantising -------------------------------------------------------------------------------------------------------
def _absolute(builder: Any, value: Any) -> Any:
    return _call(builder, "llvm.fabs.v16f32", VF32, value)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


absolute = _simple("absolute", "|x|, by clearing the sign: of NaN and zero too.", f32x16, (f32x16,), _absolute)
max_abs = _simple(
    "max_abs",
    "`(most, x)`: the larger of `most` and |x|; NaN in x is passed over.",
    f32x16,
    (f32x16, f32x16),
    lambda b, most, x: _larger(b, _absolute(b, x), most),
)
reduce_max_abs = _simple(
    "reduce_max_abs",
    "Largest |lane| (no NaN among them).",
    types.float32,
    (f32x16,),
    lambda b, x: _tree(b, _absolute(b, x), _larger),
)


def _round_i8(builder: Any, value: Any) -> Any:
    # In 1.5 * 2^23 + x the unit is 1, so the sum is rounded to an integer, nearest even, that stands in the low bits.
    clamped = _larger(builder, value, _const(VF32, -128.0))
    clamped = builder.select(builder.fcmp_ordered("<", clamped, _const(VF32, 127.0)), clamped, _const(VF32, 127.0))
    bits = builder.bitcast(builder.fadd(clamped, _const(VF32, 12582912.0)), VI32)
    rounded = builder.sub(bits, _const(VI32, 0x4B400000))
    return builder.select(builder.fcmp_unordered("uno", value, value), _const(VI32, 0), rounded)


round_i8 = _simple(
    "round_i8",
    "f32 lanes to -128..127, nearest even, saturating; NaN gives 0. `store_i8(base, offset, round_i8(x))` writes int8.",
    i32x16,
    (f32x16,),
    _round_i8,
)


def _sum_i32(builder: Any, value: Any) -> Any:
    wide = builder.sext(value, ir.VectorType(I64, LANES))
    return _tree(builder, wide, lambda b, x, y: b.add(x, y))


reduce_sum_i32 = _simple("reduce_sum_i32", "Sum of 16 i32, exact, as int64.", types.int64, (i32x16,), _sum_i32)


# ---- tables -----------------------------------------------------------------------------------------------------------
def _table_u16(builder: Any, *entries: Any) -> Any:
    value = ir.Constant(VI16X2, [0] * 32)
    for i, entry in enumerate(entries * 2):
        value = builder.insert_element(value, builder.trunc(entry, VI16.element), ir.Constant(I32, i))
    return builder.bitcast(value, VI32)


table_u16 = _simple(
    "table_u16",
    "A table for `permute_u16` from 16 numbers, twice in a row, so that the fifth bit of an index does not matter.",
    i32x16,
    (types.int64,) * 16,
    _table_u16,
)


def _repeat_low_half(builder: Any, value: Any) -> Any:
    return builder.shuffle_vector(value, ir.Constant(VI32, ir.Undefined), ir.Constant(VI32, [*range(8), *range(8)]))


repeat_low_half = _simple("repeat_low_half", "The first 32 bytes, twice.", i32x16, (i32x16,), _repeat_low_half)
