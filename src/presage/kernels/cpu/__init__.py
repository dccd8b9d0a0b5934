"""CPU kernels in Python. How to write the next one.

**Where things are.** `simd`: intrinsics over 16-lane vectors. `simdmath`: exp, tanh, activations. `region`: rank, work
counter and barrier inside a kernel. `cache`: `@kernel`, `@device`, `@subroutine`. `team`: the threads and the table. `gemm`,
`pack`, `linear`: the dense matrix product. `registry`: all kernels, for warming up. `isa`: what the target CPU has.

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
