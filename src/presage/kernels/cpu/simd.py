"""Vector intrinsics for CPU kernels: each emits a few LLVM instructions, so a kernel is plain Python over registers.

Conventions. `base` is an address (int64) or a numpy array; `offset` counts elements of the named type (f32: 4 bytes,
bf16: 2, i32: 4, i64: 8, u8: 1). Nothing is bounds-checked and no alignment is needed. bf16 exists only in memory:
`load_bf16` widens 16 of them to f32 (exact), `store_bf16` rounds to nearest even (NaN becomes 0x7fc0), as torch does.
An `i32x16` also stands for 32 bf16, pair by pair: `pair_low` is the element at the lower address.

Loops over a captured constant unroll completely; `registers_f32(n)` with a captured n is then held in registers:

    acc = registers_f32(COUNT)                 # COUNT: int captured by the factory, see cache.py
    for i in range(COUNT): put(acc, i, zero_f32())
    for k in range(n):
        w = load_f32(weights, k * 16)
        for i in range(COUNT): put(acc, i, fma(w, splat_load_f32(x, i * stride + k), get(acc, i)))

Everything rounds the same on every machine except `dot_bf16` (see `isa.ISA.numerics`).
"""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any, cast

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF32,
    VI8,
    VI16,
    VI16X2,
    VI32,
    RegisterFileType,
    VectorType,
    f32x16,
    i32x16,
    mask16,
)

Built = tuple[Any, Any]
intrinsic: Any = extending.intrinsic  # what it makes is called from kernels only, where Python's signatures do not hold


class _BFloat(ir.Type):
    """LLVM's `bfloat`, which llvmlite does not define: only named as an operand type of the bf16 dot."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_VBF16 = ir.VectorType(_BFloat(), 2 * LANES)


def _const(kind: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _splat(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _pointer(context: Any, builder: Any, sig: Any, args: Any, size: int, kind: ir.Type) -> Any:
    """Pointer to element `args[1]` (of `size` bytes) behind the base `args[0]`, an address or an array."""
    if isinstance(sig.args[0], types.Array):
        start = builder.bitcast(context.make_array(sig.args[0])(context, builder, args[0]).data, I8.as_pointer())
    else:
        start = builder.inttoptr(args[0], I8.as_pointer())
    offset = args[1] if size == 1 else builder.mul(args[1], ir.Constant(I64, size))
    return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())


def _base(base: Any) -> Any:
    return base if isinstance(base, types.Array) else types.intp


def _loaded(builder: Any, pointer: Any, align: int) -> Any:
    value = builder.load(pointer)
    value.align = align
    return value


def _widen_bf16(builder: Any, halves: Any, kind: ir.Type = VI32, result: ir.Type = VF32) -> Any:
    shift = _const(VI32, 16) if kind is VI32 else ir.Constant(I32, 16)
    return builder.bitcast(builder.shl(builder.zext(halves, kind), shift), result)


def _round_bf16(builder: Any, value: Any) -> Any:
    """Vector of f32 to vector of i32 whose low half is the bf16 nearest to it, ties to even."""
    bits = builder.bitcast(value, VI32)
    odd = builder.and_(builder.lshr(bits, _const(VI32, 16)), _const(VI32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, odd), _const(VI32, 0x7FFF)), _const(VI32, 16))
    return builder.select(builder.fcmp_unordered("uno", value, value), _const(VI32, 0x7FC0), rounded)


def _load(name: str, doc: str, size: int, memory: ir.Type, result: types.Type, convert: Any = None) -> Any:
    def build(typingctx: Any, base: Any, offset: Any) -> Built:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = _loaded(builder, _pointer(context, builder, sig, args, size, memory), size)
            return convert(builder, value) if convert else value

        return result(_base(base), types.intp), emit

    return _named(build, name, doc)


def _store(name: str, doc: str, size: int, memory: ir.Type, operand: types.Type, convert: Any = None) -> Any:
    def build(typingctx: Any, base: Any, offset: Any, value: Any) -> Built:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = convert(builder, args[2]) if convert else args[2]
            builder.store(value, _pointer(context, builder, sig, args, size, memory)).align = size
            return context.get_dummy_value()

        return types.void(_base(base), types.intp, operand), emit

    return _named(build, name, doc)


def _simple(name: str, doc: str, result: types.Type, operands: tuple[types.Type, ...], body: Any) -> Any:
    """An intrinsic of fixed signature; `body(builder, *values)` emits it."""

    def build(typingctx: Any, *values: Any) -> Built | None:
        return (result(*operands), emit) if len(values) == len(operands) else None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return body(builder, *args)

    # numba binds arguments by the builder's signature: give it one parameter per operand instead of *values.
    names = ["typingctx", *(f"operand{i}" for i in range(len(operands)))]
    cast(Any, build).__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    return _named(build, name, doc)


def _named(build: Any, name: str, doc: str) -> Any:
    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc
    return intrinsic(build)


def _splat_convert(kind: ir.VectorType) -> Any:
    return lambda builder, scalar: _splat(builder, scalar, kind)


# ---- memory -------------------------------------------------------------------------------------------------------
load_f32 = _load("load_f32", "16 f32.", 4, VF32, f32x16)
load_i32 = _load("load_i32", "16 i32 (or 32 bf16, or 64 bytes): offset counts 4-byte elements.", 4, VI32, i32x16)
load_bf16 = _load("load_bf16", "16 bf16 widened to f32.", 2, VI16, f32x16, _widen_bf16)
load_u8 = _load("load_u8", "16 bytes widened to i32.", 1, ir.VectorType(I8, LANES), i32x16, lambda b, v: b.zext(v, VI32))
load_i8 = _load("load_i8", "16 signed bytes widened to i32.", 1, ir.VectorType(I8, LANES), i32x16, lambda b, v: b.sext(v, VI32))
splat_load_f32 = _load("splat_load_f32", "One f32 in all lanes.", 4, FLOAT, f32x16, _splat_convert(VF32))
splat_load_i32 = _load(
    "splat_load_i32", "Four bytes (a bf16 pair, four int8) in all lanes; offset in i32.", 4, I32, i32x16, _splat_convert(VI32)
)
splat_load_bf16 = _load(
    "splat_load_bf16", "One bf16, widened, in all lanes.", 2, I16, f32x16, lambda b, v: _splat(b, _widen_bf16(b, v, I32, FLOAT), VF32)
)
store_f32 = _store("store_f32", "16 f32.", 4, VF32, f32x16)
store_i32 = _store("store_i32", "16 i32.", 4, VI32, i32x16)
store_bf16 = _store("store_bf16", "16 f32 rounded to bf16.", 2, VI16, f32x16, lambda b, v: b.trunc(_round_bf16(b, v), VI16))
store_i8 = _store(
    "store_i8", "The low bytes of 16 i32.", 1, ir.VectorType(I8, LANES), i32x16, lambda b, v: b.trunc(v, ir.VectorType(I8, LANES))
)

get_f32 = _load("get_f32", "Scalar f32.", 4, FLOAT, types.float32)
get_bf16 = _load("get_bf16", "Scalar bf16 as float32.", 2, I16, types.float32, lambda b, v: _widen_bf16(b, v, I32, FLOAT))
get_i64 = _load("get_i64", "Scalar int64; kernels read their table with it.", 8, I64, types.int64)
get_i32 = _load("get_i32", "Scalar int32, widened to int64.", 4, I32, types.int64, lambda b, v: b.sext(v, I64))
get_u16 = _load("get_u16", "Scalar uint16, widened to int64.", 2, I16, types.int64, lambda b, v: b.zext(v, I64))
get_i8 = _load("get_i8", "Scalar int8, widened to int64.", 1, I8, types.int64, lambda b, v: b.sext(v, I64))
get_u8 = _load("get_u8", "Scalar uint8, widened to int64.", 1, I8, types.int64, lambda b, v: b.zext(v, I64))
set_f32 = _store("set_f32", "Scalar f32.", 4, FLOAT, types.float32)
set_i32 = _store("set_i32", "Scalar int64 stored as int32.", 4, I32, types.int64, lambda b, v: b.trunc(v, I32))
set_i64 = _store("set_i64", "Scalar int64.", 8, I64, types.int64)
set_u8 = _store("set_u8", "Scalar int64 stored as a byte.", 1, I8, types.int64, lambda b, v: b.trunc(v, I8))


def _round_scalar(builder: Any, value: Any) -> Any:
    return builder.trunc(builder.extract_element(_round_bf16(builder, _splat(builder, value, VF32)), ir.Constant(I32, 0)), I16)


set_bf16 = _store("set_bf16", "Scalar float32 rounded to bf16.", 2, I16, types.float32, _round_scalar)


def _first(builder: Any, count: Any) -> Any:
    lanes = ir.Constant(VI32, list(range(LANES)))
    return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, I32), VI32))


def _load_first(name: str, doc: str, size: int, memory: ir.VectorType, suffix: str, convert: Any) -> Any:
    def build(typingctx: Any, base: Any, offset: Any, count: Any) -> Built:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _pointer(context, builder, sig, args, size, memory)
            zero = ir.Constant(memory, [0] * LANES)
            value = _masked(builder, f"llvm.masked.load.v16{suffix}.p0", memory, [pointer], size, _first(builder, args[2]), zero)
            return convert(builder, value) if convert else value

        return f32x16(_base(base), types.intp, types.intp), emit

    return _named(build, name, doc)


def _store_first(name: str, doc: str, size: int, memory: ir.VectorType, suffix: str, convert: Any) -> Any:
    def build(typingctx: Any, base: Any, offset: Any, value: Any, count: Any) -> Built:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = convert(builder, args[2]) if convert else args[2]
            pointer = _pointer(context, builder, sig, args, size, memory)
            _masked(builder, f"llvm.masked.store.v16{suffix}.p0", ir.VoidType(), [value, pointer], size, _first(builder, args[3]))
            return context.get_dummy_value()

        return types.void(_base(base), types.intp, f32x16, types.intp), emit

    return _named(build, name, doc)


def _masked(builder: Any, name: str, result: ir.Type, operands: list[Any], align: int, mask: Any, *rest: Any) -> Any:
    # LLVM's auto-upgrade accepts the older form with an explicit alignment operand, which llvmlite can spell.
    return _call(builder, name, result, *operands, ir.Constant(I32, align), mask, *rest)


load_f32_n = _load_first("load_f32_n", "The first `count` of 16 f32, zero beyond (not read).", 4, VF32, "f32", None)
load_bf16_n = _load_first("load_bf16_n", "The first `count` of 16 bf16 widened, zero beyond (not read).", 2, VI16, "i16", _widen_bf16)
store_f32_n = _store_first("store_f32_n", "`(base, offset, value, count)`: only the first `count` lanes.", 4, VF32, "f32", None)
store_bf16_n = _store_first(
    "store_bf16_n",
    "`(base, offset, value, count)`: only the first `count` lanes, rounded.",
    2,
    VI16,
    "i16",
    lambda b, v: b.trunc(_round_bf16(b, v), VI16),
)


def _prefetch(name: str, locality: int, doc: str) -> Any:
    def build(typingctx: Any, base: Any, offset: Any) -> Built:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _pointer(context, builder, sig, args, 1, I8)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, v) for v in (0, locality, 1)))
            return context.get_dummy_value()

        return types.void(_base(base), types.intp), emit

    return _named(build, name, doc)


prefetch = _prefetch("prefetch", 3, "Ask for the cache line at byte `offset`, into L1; never faults. At most ~20 are in flight.")
prefetch_l2 = _prefetch("prefetch_l2", 2, "The same into L2 only: leaves L1's few miss slots to the loads, so better for long streams.")


# ---- lanes --------------------------------------------------------------------------------------------------------
zero_f32 = _simple("zero_f32", "All lanes 0.0.", f32x16, (), lambda b: _const(VF32, 0.0))
zero_i32 = _simple("zero_i32", "All lanes 0.", i32x16, (), lambda b: _const(VI32, 0))
broadcast_f32 = _simple("broadcast_f32", "A float32 in all lanes.", f32x16, (types.float32,), lambda b, x: _splat(b, x, VF32))
broadcast_i32 = _simple(
    "broadcast_i32", "The low 32 bits of an int64 in all lanes.", i32x16, (types.int64,), lambda b, x: _splat(b, b.trunc(x, I32), VI32)
)
lane_index = _simple("lane_index", "0, 1, ..., 15.", i32x16, (), lambda b: ir.Constant(VI32, list(range(LANES))))
first_lanes = _simple("first_lanes", "Mask of the first `count` lanes.", mask16, (types.int64,), _first)
fma = _simple("fma", "x * y + z, rounded once.", f32x16, (f32x16,) * 3, lambda b, x, y, z: _call(b, "llvm.fma.v16f32", VF32, x, y, z))
sqrt = _simple("sqrt", "Correctly rounded square root.", f32x16, (f32x16,), lambda b, x: _call(b, "llvm.sqrt.v16f32", VF32, x))
select = _simple("select", "m ? x : y per lane, for f32.", f32x16, (mask16, f32x16, f32x16), lambda b, m, x, y: b.select(m, x, y))
select_i32 = _simple("select_i32", "m ? x : y per lane, for i32.", i32x16, (mask16, i32x16, i32x16), lambda b, m, x, y: b.select(m, x, y))
# A compare and a select: the result is the second operand if either is NaN, on every machine.
maximum = _simple(
    "maximum", "x > y ? x : y; NaN in x gives y.", f32x16, (f32x16,) * 2, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y)
)
minimum = _simple(
    "minimum", "x < y ? x : y; NaN in x gives y.", f32x16, (f32x16,) * 2, lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y)
)
float_of = _simple("float_of", "i32 lanes to f32 (nearest even).", f32x16, (i32x16,), lambda b, x: b.sitofp(x, VF32))
int_bits = _simple("int_bits", "The bits of f32 lanes as i32.", i32x16, (f32x16,), lambda b, x: b.bitcast(x, VI32))
float_bits = _simple("float_bits", "i32 lanes read as f32 bits.", f32x16, (i32x16,), lambda b, x: b.bitcast(x, VF32))
pair_low = _simple(
    "pair_low",
    "The bf16 in the low halves (lower address), as f32.",
    f32x16,
    (i32x16,),
    lambda b, x: b.bitcast(b.shl(x, _const(VI32, 16)), VF32),
)
pair_high = _simple(
    "pair_high",
    "The bf16 in the high halves, as f32.",
    f32x16,
    (i32x16,),
    lambda b, x: b.bitcast(b.and_(x, _const(VI32, 0xFFFF0000)), VF32),
)
any_of = _simple(
    "any_of", "Is any lane set?", types.boolean, (mask16,), lambda b, m: b.icmp_unsigned("!=", b.bitcast(m, I16), ir.Constant(I16, 0))
)
all_of = _simple(
    "all_of",
    "Are all lanes set?",
    types.boolean,
    (mask16,),
    lambda b, m: b.icmp_unsigned("==", b.bitcast(m, I16), ir.Constant(I16, 0xFFFF)),
)


def _join(builder: Any, low: Any, high: Any) -> Any:
    return builder.or_(_round_bf16(builder, low), builder.shl(_round_bf16(builder, high), _const(VI32, 16)))


pair_join = _simple("pair_join", "Two f32 vectors rounded to bf16, `low` in the low halves.", i32x16, (f32x16, f32x16), _join)


def _nearest(builder: Any, value: Any) -> Any:
    """f32 rounded to an integer, nearest even."""
    if current_isa().bits or current_isa().neon:
        return _call(builder, "llvm.roundeven.v16f32", VF32, value)
    # Portable: beyond 2^23 every f32 is an integer, below it the sum with 2^23 rounds; LLVM would call a function per lane.
    border = _const(VF32, 2.0**23)
    signed = _call(builder, "llvm.copysign.v16f32", VF32, border, value)
    small = builder.fcmp_ordered("<", _call(builder, "llvm.fabs.v16f32", VF32, value), border)
    return builder.select(small, builder.fsub(builder.fadd(value, signed), signed), value)


def _round_to_int(builder: Any, value: Any) -> Any:
    # Clamped before and mended after: LLVM's own saturating conversion becomes a hundred scalar instructions.
    lowest, highest = _const(VF32, -(2.0**31)), _const(VF32, 2.0**31 - 128)
    inside = builder.select(builder.fcmp_ordered(">", value, lowest), value, lowest)
    inside = builder.select(builder.fcmp_ordered("<", inside, highest), inside, highest)
    rounded = builder.fptosi(_nearest(builder, inside), VI32)
    rounded = builder.select(builder.fcmp_ordered(">", value, highest), _const(VI32, 0x7FFFFFFF), rounded)
    return builder.select(builder.fcmp_unordered("uno", value, value), _const(VI32, 0), rounded)


round_int = _simple("round_int", "f32 lanes to i32, nearest even, saturating; NaN gives 0.", i32x16, (f32x16,), _round_to_int)


def _tree(builder: Any, value: Any, combine: Any) -> Any:
    """Fold the upper half onto the lower until one lane is left: a fixed order whatever the register width."""
    lanes = LANES
    while lanes > 1:
        half = lanes // 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (ir.Constant(ir.VectorType(I32, half), list(range(start, start + half))) for start in (0, half))
        value = combine(builder, builder.shuffle_vector(value, undefined, low), builder.shuffle_vector(value, undefined, high))
        lanes = half
    return builder.extract_element(value, ir.Constant(I32, 0))


reduce_sum = _simple(
    "reduce_sum",
    "Sum of the lanes in a fixed tree (8+8, 4+4, 2+2, 1+1).",
    types.float32,
    (f32x16,),
    lambda b, x: _tree(b, x, lambda b, p, q: b.fadd(p, q)),
)
reduce_max = _simple(
    "reduce_max",
    "Largest lane (no NaN among them).",
    types.float32,
    (f32x16,),
    lambda b, x: _tree(b, x, lambda b, p, q: b.select(b.fcmp_ordered(">", p, q), p, q)),
)


# ---- dot products: the only lowering that depends on the instruction set ---------------------------------------------
def _dot_bf16(builder: Any, acc: Any, x: Any, y: Any) -> Any:
    if current_isa().bf16_dot:
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VF32, acc, builder.bitcast(x, _VBF16), builder.bitcast(y, _VBF16))
    # High halves first, as the instruction does: only denormals (zero to it) tell the two lowerings apart.
    shift, high = _const(VI32, 16), _const(VI32, 0xFFFF0000)
    low_x, low_y = (builder.bitcast(builder.shl(v, shift), VF32) for v in (x, y))
    high_x, high_y = (builder.bitcast(builder.and_(v, high), VF32) for v in (x, y))
    return _call(builder, "llvm.fma.v16f32", VF32, low_x, low_y, _call(builder, "llvm.fma.v16f32", VF32, high_x, high_y, acc))


dot_bf16 = _simple(
    "dot_bf16", "acc + x.high * y.high, then + x.low * y.low, each rounded once; x, y: 16 bf16 pairs.", f32x16, (f32x16, i32x16, i32x16), _dot_bf16
)


def piece(builder: Any, value: Any, index: int, count: int) -> Any:
    """The `index`-th of `count` equal pieces of a vector."""
    size = value.type.count // count
    lanes = ir.Constant(ir.VectorType(I32, size), list(range(index * size, (index + 1) * size)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)


def in_parts(builder: Any, name: str, bits: int, result: ir.VectorType, *operands: Any, every: tuple[Any, ...] = ()) -> Any:
    """Call a target intrinsic whose registers have `bits` bits on the pieces of 512-bit operands, after the operands that `every`
    call gets; `result` is the type of the whole."""
    count = 512 // bits
    part = ir.VectorType(result.element, result.count // count)
    parts = [_call(builder, name, part, *every, *(piece(builder, v, index, count) for v in operands)) for index in range(count)]
    while len(parts) > 1:
        both = ir.Constant(ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(low, high, both) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def signed_halves(builder: Any, value: Any, kind: ir.VectorType, bits: int) -> tuple[Any, Any]:
    """Each lane's two halves (of `bits` bits), sign-extended to a lane of `kind`: low and high."""
    value, shift = builder.bitcast(value, kind), _const(kind, bits)
    return builder.ashr(builder.shl(value, shift), shift), builder.ashr(value, shift)


def madd_i16(builder: Any, x: Any, y: Any) -> Any:
    """Sum of the two products of signed 16-bit numbers in each i32 lane, modulo 2^32."""
    isa = current_isa()
    if isa.bits:
        name = "llvm.x86.avx512.pmaddw.d.512" if isa.bits == 512 else "llvm.x86.avx2.pmadd.wd"
        return in_parts(builder, name, isa.bits, VI32, x, y)
    (low_x, high_x), (low_y, high_y) = (signed_halves(builder, value, VI32, 16) for value in (x, y))
    return builder.add(builder.mul(low_x, low_y), builder.mul(high_x, high_y))


def _byte_products(builder: Any, u: Any, s: Any) -> list[Any]:
    """u8 * s8 by way of 16 bits, two times two products per i32 lane. What is done to `u` does not depend on `s`, and the
    other way round: in a tile LLVM splits a weight once for all rows and an activation once for all columns."""
    unsigned = builder.bitcast(u, VI16X2)
    low_u, high_u = builder.and_(unsigned, _const(VI16X2, 0xFF)), builder.lshr(unsigned, _const(VI16X2, 8))
    pairs = list(zip((low_u, high_u), signed_halves(builder, s, VI16X2, 8), strict=True))
    if current_isa().neon:
        # 255 * -128 fits 16 bits, so a multiplication of twice as many lanes will do.
        products = [builder.mul(x, y) for x, y in pairs]
        return [in_parts(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", 128, VI32, p) for p in products]
    return [madd_i16(builder, x, y) for x, y in pairs]


def _dot_u8s8(builder: Any, acc: Any, u: Any, s: Any) -> Any:
    isa = current_isa()
    u, s = builder.bitcast(u, VI8), builder.bitcast(s, VI8)
    if isa.vnni:
        return in_parts(builder, f"llvm.x86.avx512.vpdpbusd.{isa.bits}", isa.bits, VI32, acc, u, s)
    if isa.i8mm:  # NEON lowerings are compiled but have not been run
        return in_parts(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", 128, VI32, acc, u, s)
    if isa.dotprod:
        # u = (u - 128) + 128, and 128 is 64 twice; the second part depends on s only.
        sdot, quarter = "llvm.aarch64.neon.sdot.v4i32.v16i8", _const(VI8, 64)
        rest = in_parts(builder, sdot, 128, VI32, in_parts(builder, sdot, 128, VI32, _const(VI32, 0), s, quarter), s, quarter)
        return builder.add(in_parts(builder, sdot, 128, VI32, acc, builder.xor(u, _const(VI8, 128)), s), rest)
    for products in _byte_products(builder, u, s):
        acc = builder.add(acc, products)
    return acc


dot_u8s8 = _simple("dot_u8s8", "acc + sum of 4 products u8 * s8 per lane, exact (modulo 2^32).", i32x16, (i32x16, i32x16, i32x16), _dot_u8s8)


# ---- register files -------------------------------------------------------------------------------------------------
def _registers(name: str, element: VectorType) -> Any:
    def build(typingctx: Any, count: Any) -> Built | None:
        if not isinstance(count, types.IntegerLiteral):
            return None
        size = count.literal_value

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return cgutils.alloca_once(builder, element.lanes, size=size)

        return RegisterFileType(element)(count), emit

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`count` uninitialised {element.name} values; `count` must be a literal or a captured int."
    return intrinsic(prefer_literal=True)(build)


registers_f32 = _registers("registers_f32", f32x16)
registers_i32 = _registers("registers_i32", i32x16)


@intrinsic
def get(typingctx: Any, file: Any, index: Any) -> Built:
    """Vector `index` of a register file."""
    return file.element(file, types.intp), lambda context, builder, sig, args: builder.load(builder.gep(args[0], [args[1]]))


@intrinsic
def put(typingctx: Any, file: Any, index: Any, value: Any) -> Built:
    """Set vector `index` of a register file."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(file, types.intp, file.element), emit


# ---- between threads ------------------------------------------------------------------------------------------------
@intrinsic
def atomic_add(typingctx: Any, base: Any, offset: Any, value: Any) -> Built:
    """Add to the int64 at `offset` (in int64) and return what was there before."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(context, builder, sig, args, 8, I64), args[2], "seq_cst")

    return types.int64(_base(base), types.intp, types.int64), emit


@intrinsic
def atomic_load(typingctx: Any, base: Any, offset: Any) -> Built:
    """The int64 at `offset` (in int64), ordered after earlier atomics."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, sig, args, 8, I64), "seq_cst", 8)

    return types.int64(_base(base), types.intp), emit


@intrinsic
def atomic_store(typingctx: Any, base: Any, offset: Any, value: Any) -> Built:
    """Publish an int64 at `offset` (in int64)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _pointer(context, builder, sig, args, 8, I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(_base(base), types.intp, types.int64), emit


@intrinsic
def outlined(typingctx: Any) -> Built:
    """Keep the function that says so a call, so that its code exists once; see `cache.subroutine`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def pause(typingctx: Any) -> Built:
    """Tell the core that this is a spin loop."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # Elsewhere nothing is needed: the atomic load in the loop keeps it from being removed.
        if str(builder.module.triple).startswith(("x86", "i686")):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), emit
