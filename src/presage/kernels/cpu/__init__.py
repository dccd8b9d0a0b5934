"""CPU kernels in Python. How to write the next one.

**Where things are.** `simd`: intrinsics over 16-lane vectors; `simd_int`: more of them, for integers and quantising. `simdmath`: exp,
tanh, activations. `region`: rank, work counter and barrier inside a kernel. `cache`: `@kernel`, `@device`, `@subroutine`. `team`: the
threads and the table. `gemm`, `pack`, `linear`: the dense matrix product. `registry`: all kernels, for warming up. `isa`: what the
target CPU has.

**A kernel** is a factory (its ints and strings become constants of the compiled code) returning a function of one address:

    WORDS = 4
    SOURCE, TARGET, ROWS, FACTOR = range(HEADER, HEADER + WORDS)     # words of the table, after the region's header

    @kernel
    def scale_rows(columns: int) -> Any:
        vectors = columns // 16                                      # a captured int: loops over it unroll

        def run(table):
            enter(table)                                             # every thread, exactly once
            rows, source, target = get_i64(table, ROWS), get_i64(table, SOURCE), get_i64(table, TARGET)
            factor = broadcast_f32(get_f32(table, 2 * FACTOR))       # the low half of word FACTOR
            row = claim(table)
            while row < rows:
                for v in range(vectors):
                    at = row * columns + v * 16
                    store_f32(target, at, load_f32(source, at) * factor)
                row = claim(table)
            leave(table)

        return run

**The wrapper** checks shapes and types (kernels never raise: errors inside a C callback are lost), writes the table, runs:

    table = team.table(WORDS)                                        # once per call site
    team.run(scale_rows(64), table.set(x.data_ptr(), out.data_ptr(), rows, bits), work=x.nbytes)

Bind `team`, table and addresses at load; a call then costs about 2 us. `work` decides whether the GIL is released.

**Integers.** An `i32x16` is 16 int32, or 64 bytes seen as 16 words. Put 16 outputs side by side, four inputs to a word, and repeat
four int8 of the row in all lanes (`splat_load_i32`): each dot instruction then does 64 products, and no lanes need folding.

    q = load_i32(codes, step * 16)                                       # 128 4-bit codes: 16 outputs x 8 inputs
    acc = dot_u7s8(acc, low_nibbles(q), splat_load_i32(x, 2 * step))     # inputs 0-3 in the low nibbles
    acc = dot_u7s8(acc, high_nibbles(q), splat_load_i32(x, 2 * step + 1))

`dot_u7s8` is for unsigned operands up to 127, `dot_u8s8` for all (dearer without VNNI), `dot_i16` for 16-bit pairs; all are exact. Codes
with an offset: subtract it once, times the sum of the row. `lookup_u8` maps 4-bit codes by a table of 16 bytes, `permute_u16` by one of
32 words. To quantise: `max_abs` over the row, `reduce_max`, then `store_i8(out, d, round_i8(x * factor))`.

**Instruction sets.** Kernels speak 16 lanes; LLVM splits them. Only intrinsics ask `current_isa()`. Integers and f32 have the same bits
everywhere, `dot_bf16` those of `ISA.numerics`. `NUMBA_CPU_NAME=haswell` compiles for AVX2 on a larger machine, `x86-64` for the portable
fallback: run a kernel's tests with both. A new intrinsic goes into tests/tiny/simd_ops.py, its numpy form into test_simd_int.py.

**Rules.** (1) A row's bits depend on that row only: sums run in a fixed order (K or keys ascending, one accumulator per output,
lanes folded by `reduce_sum`), never by row count or thread. (2) No masked lane is multiplied by zero: use `select`, `..._n`.
(3) Never read beyond what is declared visible. (4) Use explicit `fma`; there is no fast math. (5) Everything a kernel calls is
`@device` (inlined, may take register files) or `@subroutine` (a call, for large rare code). Constants: captured ints only;
what a literal needs must be one captured name (`registers_f32(count)`, not `registers_f32(a * b)`). (6) No allocation: scratch
comes from `team.scratch`. (7) List the usual variants in the module's `warm_kernels()`, so they are compiled at start.

Compiled code is kept on disk (`cache.cache_directory`), keyed by all sources in this folder: editing any file here recompiles all.

    from presage.kernels.cpu.environment import prepare_environment   # before torch is imported
    from presage.kernels.cpu.team import Team
    from presage.kernels.cpu.pack import PackedLinear, pack, pack_gate_up, unpack
    from presage.kernels.cpu.linear import Experts, grouped_linear, linear
    from presage.kernels.cpu.registry import warm_up
"""
