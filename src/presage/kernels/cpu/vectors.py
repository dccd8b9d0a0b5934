"""The vector types of the kernels and the operators on them: 16 lanes, whatever the machine's registers hold.

A numba type whose data model is an LLVM vector stays in registers inside a kernel. LLVM splits 16 lanes into as many
hardware registers as the target needs (one on AVX-512, two on AVX2, four on SSE or NEON), so there is one source for all.
Operators (`a + b`, `a < b`, `m & n`) are plain LLVM instructions without fast-math flags: nothing is contracted or
re-associated, so bits do not depend on how LLVM arranges the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

LANES = 16

I1, I8, I16, I32, I64, FLOAT = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF32 = ir.VectorType(FLOAT, LANES)
VI32 = ir.VectorType(I32, LANES)
VI16 = ir.VectorType(I16, LANES)
VI16X2 = ir.VectorType(I16, 2 * LANES)
VI8 = ir.VectorType(I8, 4 * LANES)
VI1 = ir.VectorType(I1, LANES)


class VectorType(types.Type):
    """A numba type held as one LLVM vector value; `lanes` is its LLVM type."""

    def __init__(self, name: str, lanes: ir.VectorType) -> None:
        self.lanes = lanes
        super().__init__(name=name)


class RegisterFileType(types.Type):
    """A stack array of `element` vectors; LLVM turns it into registers once the loops over it are unrolled."""

    def __init__(self, element: VectorType) -> None:
        self.element = element
        super().__init__(name=f"registers({element.name})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: VectorType) -> None:
        super().__init__(manager, fe_type, fe_type.lanes)


@register_model(RegisterFileType)
class _RegisterFileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: RegisterFileType) -> None:
        super().__init__(manager, fe_type, fe_type.element.lanes.as_pointer())


f32x16 = VectorType("f32x16", VF32)
"""16 floats."""
i32x16 = VectorType("i32x16", VI32)
"""16 int32; also 32 bf16 (pairs along K) or 64 bytes seen as 32-bit lanes."""
mask16 = VectorType("mask16", VI1)
"""16 booleans: what comparisons give and `select` takes."""

Emit = Callable[[Any, Any, Any], Any]


def _operator(function: Any, cases: dict[tuple[VectorType, VectorType], tuple[VectorType, Emit]]) -> None:
    """Teach numba `function(a, b)` for the given operand types: typing and lowering, no overload to compile."""
    signatures = [signature(result, *operands) for operands, (result, _) in cases.items()]
    infer_global(function)(type(f"Vector_{function.__name__}", (ConcreteTemplate,), {"cases": signatures}))
    for operands, (_, emit) in cases.items():

        def lower(context: Any, builder: Any, sig: Any, args: Any, emit: Emit = emit) -> Any:
            return emit(builder, args[0], args[1])

        lower_builtin(function, *operands)(lower)


def _compare(symbol: str) -> dict[tuple[VectorType, VectorType], tuple[VectorType, Emit]]:
    return {
        (f32x16, f32x16): (mask16, lambda b, x, y: b.fcmp_ordered(symbol, x, y)),
        (i32x16, i32x16): (mask16, lambda b, x, y: b.icmp_signed(symbol, x, y)),
    }


def _register_operators() -> None:
    ff, ii, mm = (f32x16, f32x16), (i32x16, i32x16), (mask16, mask16)
    _operator(operator.add, {ff: (f32x16, lambda b, x, y: b.fadd(x, y)), ii: (i32x16, lambda b, x, y: b.add(x, y))})
    _operator(operator.sub, {ff: (f32x16, lambda b, x, y: b.fsub(x, y)), ii: (i32x16, lambda b, x, y: b.sub(x, y))})
    _operator(operator.mul, {ff: (f32x16, lambda b, x, y: b.fmul(x, y)), ii: (i32x16, lambda b, x, y: b.mul(x, y))})
    _operator(operator.truediv, {ff: (f32x16, lambda b, x, y: b.fdiv(x, y))})
    _operator(operator.and_, {ii: (i32x16, lambda b, x, y: b.and_(x, y)), mm: (mask16, lambda b, x, y: b.and_(x, y))})
    _operator(operator.or_, {ii: (i32x16, lambda b, x, y: b.or_(x, y)), mm: (mask16, lambda b, x, y: b.or_(x, y))})
    _operator(operator.xor, {ii: (i32x16, lambda b, x, y: b.xor(x, y)), mm: (mask16, lambda b, x, y: b.xor(x, y))})
    _operator(operator.lshift, {ii: (i32x16, lambda b, x, y: b.shl(x, y))})
    _operator(operator.rshift, {ii: (i32x16, lambda b, x, y: b.lshr(x, y))})
    for function, symbol in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
        _operator(function, _compare(symbol))
    _operator(operator.eq, _compare("=="))


_register_operators()
