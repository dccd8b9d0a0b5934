"""Which instruction set is chosen, and which instructions each intrinsic becomes: for CPUs that tests do not run on, all that can be seen."""

from __future__ import annotations

from typing import Any

import pytest
from llvmlite import binding, ir

from presage.kernels.cpu import isa, simd, simd_int
from presage.kernels.cpu.vectors import I32, VF32, VI16, VI32

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
CASES: dict[str, tuple[Any, tuple[ir.Type, ...]]] = {
    "dot_u8s8": (simd._dot_u8s8, (VI32,) * 3),
    "dot_u7s8": (simd_int._dot_u7s8, (VI32,) * 3),
    "dot_i16": (simd_int._dot_i16, (VI32,) * 3),
    "dot_bf16": (simd._dot_bf16, (VF32, VI32, VI32)),
    "lookup_u8": (simd_int._lookup_u8, (VI32,) * 2),
    "permute_u16": (simd_int._permute_u16, (VI32,) * 2),
    "round_int": (simd._round_to_int, (VF32,)),
    "round_i8": (simd_int._round_i8, (VF32,)),
    "load_f16": (simd_int._widen_f16, (VI16,)),
}


def assembly(name: str, level: isa.ISA, cpu: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mnemonics of an intrinsic, compiled for a CPU of that level; skips where this LLVM has no such target."""
    triple = ARM if level.neon else X86
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip("this llvmlite has no such target")
    for module in (simd, simd_int):
        monkeypatch.setattr(module, "current_isa", lambda: level)
    body, operands = CASES[name]
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I32.as_pointer()] * (len(operands) + 1)), "it")
    builder = ir.IRBuilder(function.append_basic_block())
    values = [builder.load(builder.bitcast(at, kind.as_pointer())) for at, kind in zip(function.args[1:], operands)]
    result = body(builder, *values)
    builder.store(result, builder.bitcast(function.args[0], result.type.as_pointer()))
    builder.ret_void()
    machine = target.create_target_machine(cpu=cpu, opt=3)
    lines = machine.emit_assembly(binding.parse_assembly(str(module))).splitlines()
    code = [line.strip().removeprefix("{vex}").split() for line in lines if line.startswith("\t")]
    return [words[0].split(".")[0] for words in code if words and not words[0].startswith((".", "#", "//"))]


@pytest.mark.parametrize(("level", "cpu", "name", "instruction", "count"), [
    (isa.AVX512_BF16, "znver4", "dot_u8s8", "vpdpbusd", 1), (isa.AVX512_BF16, "znver4", "dot_bf16", "vdpbf16ps", 1),
    (isa.AVX512_VNNI, "cascadelake", "dot_i16", "vpdpwssd", 1), (isa.AVX512, "skylake-avx512", "dot_u8s8", "vpmaddwd", 2),
    (isa.AVX512, "skylake-avx512", "dot_u7s8", "vpmaddubsw", 1), (isa.AVX512, "skylake-avx512", "permute_u16", "vpermw", 1),
    (isa.AVX512, "skylake-avx512", "load_f16", "vcvtph2ps", 1), (isa.AVX2, "haswell", "load_f16", "vcvtph2ps", 2),
    (isa.AVX2, "haswell", "dot_u8s8", "vpmaddwd", 4), (isa.AVX2, "haswell", "dot_u7s8", "vpmaddubsw", 2),
    (isa.AVX2, "haswell", "dot_i16", "vpmaddwd", 2), (isa.AVX2, "haswell", "lookup_u8", "vpshufb", 2),
    (isa.AVX2, "haswell", "permute_u16", "vpshufb", 8), (isa.AVX2_VNNI, "alderlake", "dot_u8s8", "vpdpbusd", 2),
    (isa.AVX2_VNNI, "alderlake", "dot_i16", "vpdpwssd", 2),
    (isa.NEON_I8MM, "neoverse-v1", "dot_u8s8", "usdot", 4), (isa.NEON_I8MM, "neoverse-v1", "dot_u7s8", "usdot", 4),
    (isa.NEON_DOT, "neoverse-n1", "dot_u8s8", "sdot", 12), (isa.NEON_DOT, "neoverse-n1", "dot_u7s8", "sdot", 4),
    (isa.NEON, "cortex-a72", "lookup_u8", "tbl", 4), (isa.NEON, "cortex-a72", "permute_u16", "tbl", 4),
    (isa.NEON, "cortex-a72", "round_int", "fcvtzs", 4),
])  # fmt: skip
def test_instructions(level: isa.ISA, cpu: str, name: str, instruction: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assembly(name, level, cpu, monkeypatch).count(instruction) == count


@pytest.mark.parametrize(("level", "cpu"), [
    (isa.AVX512_BF16, "znver4"), (isa.AVX512, "skylake-avx512"), (isa.AVX2, "haswell"), (isa.AVX2_VNNI, "alderlake"), (isa.BASE, "x86-64"),
    (isa.NEON_I8MM, "neoverse-v2"), (isa.NEON_DOT, "apple-m1"), (isa.NEON, "cortex-a72"),
])  # fmt: skip
def test_nothing_calls_a_function_or_works_lane_by_lane(level: isa.ISA, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without these instructions a fused multiply-add has to be a call.
    names = [name for name in CASES if name != "dot_bf16" or level is not isa.BASE]
    for name in names:
        found = assembly(name, level, cpu, monkeypatch)
        # An indexed search without an instruction for it goes over all entries; nothing else is long.
        limit = 900 if name in ("permute_u16", "lookup_u8") and level is isa.BASE else 160
        assert not {"callq", "bl", "call"} & set(found) and len(found) <= limit, (name, len(found))


def test_levels_follow_from_features() -> None:
    wide = dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx512dq"), True)
    haswell = dict.fromkeys(("avx2", "fma", "f16c"), True)
    steps = [
        ({}, isa.BASE), ({"avx2": True, "fma": True}, isa.BASE), (haswell, isa.AVX2), (haswell | {"avxvnni": True}, isa.AVX2_VNNI),
        (haswell | wide, isa.AVX512), (haswell | wide | {"avx512vl": False}, isa.AVX2), (haswell | wide | {"avx512bf16": True}, isa.AVX512),
        (wide | {"avx512vnni": True}, isa.AVX512_VNNI), (wide | {"avx512vnni": True, "avx512bf16": True}, isa.AVX512_BF16),
    ]  # fmt: skip
    assert [isa.of_features(features, arm=False) for features, _ in steps] == [level for _, level in steps]
    arm: list[tuple[dict[str, bool], isa.ISA]] = [({}, isa.NEON), ({"dotprod": True}, isa.NEON_DOT), ({"i8mm": True, "dotprod": True}, isa.NEON_I8MM)]
    assert [isa.of_features(features, arm=True) for features, _ in arm] == [level for _, level in arm]
    assert {level.numerics for _, level in steps + arm} == {"dot", "fma"} and isa.AVX512_VNNI.numerics == "fma"


def test_a_named_cpu_goes_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, level in (("znver4", isa.AVX512_BF16), ("haswell", isa.AVX2), ("neoverse-n1", isa.NEON_DOT), ("nonesuch", isa.BASE)):
        monkeypatch.setattr(isa.config, "CPU_NAME", name)
        isa.current_isa.cache_clear()
        assert isa.current_isa() is level
    monkeypatch.undo()
    isa.current_isa.cache_clear()
    assert isa.current_isa().tile_rows


@pytest.mark.parametrize(("name", "given", "wanted"), [
    (None, None, None), ("haswell", None, ""), ("haswell", "+avx512f", "+avx512f"), ("nonesuch", None, "+64bit,+x87,+cx8,+fxsr,+sse2"),
])  # fmt: skip
def test_a_named_cpu_gets_no_features_of_the_host(name: str | None, given: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa.config, "CPU_NAME", name)
    monkeypatch.setattr(isa.config, "CPU_FEATURES", given)
    monkeypatch.setattr(isa.binding, "get_process_triple", lambda: X86)
    isa._drop_features_of_host()
    found = isa.config.CPU_FEATURES
    assert found == wanted
