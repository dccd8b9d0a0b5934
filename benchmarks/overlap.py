"""Does attention on one core beside a GEMM on the other pay on two cores (NanoFlow, arXiv 2408.12757)? The same work, one after the other or at once.

    python benchmarks/overlap.py [--formats w8a8,bf16] [--batches 16,64] [--contexts 1024,4096] [--rows 64,256] [--pairs 9]

Shapes of Llama-3.2-1B: hidden 2,048, 32 / 8 heads of 64, intermediate 8,192; bf16 KV. One layer's decode attention (B sequences of C tokens) and
gate_up + down of R rows, which do not need each other (nano-batches, or decoding beside a chunk of a prompt).

**Floors** (machine of the committed figures: 35 GB/s read, 934 Gop/s int8, 468 GFLOP/s bf16 on both cores). Attention: 2,048 B and 8,192
operations a token, 59 ns to read and 18 ns to compute. GEMM: 50.3 M weights; W8A8 1.4 ms to read and 0.108 ms a row, bf16 2.9 ms and 0.215 ms.
In sequence a part takes the longer of its two times; at once no less than all bytes and no less than all operations: column ``floor`` is the
gain if both were always busy. It is 1.01x to 1.6x here, most where both parts take equally long.

**Measured**, paired, the order alternating: (1) everything by the team of two; (2) ``split``: the main thread attends while the other runs a
share of the GEMM (or all of it beside a share of the sequences), then both cores do what is left; of the shares around the balanced one the
best is kept; (3) ``nano``: the same for halves A and B of sequences and rows, attention of A beside the GEMM of B, then swapped: what one batch
can do within a layer, at the price of reading the weights twice. ``gain`` = time of (1) over that of (2) or (3), median (lowest..highest) of the
pairs. ``1 core``: attention on one core over attention on two, alone: 2.0 if a core can use only half of the memory's speed, 1.0 if one core
has all of it. The gain comes from what it lacks to 2.0.
Results must have the same bits in every mode. The hand-over to the second thread (printed) is in the times.
"""

from __future__ import annotations

from presage.kernels.cpu.environment import prepare_environment

prepare_environment()

import argparse  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import torch  # noqa: E402

from presage.kernels.cpu.attention import AttentionBatch, PagedAttention, cache_shapes  # noqa: E402
from presage.kernels.cpu.linear import linear  # noqa: E402
from presage.kernels.cpu.memory import Arena  # noqa: E402
from presage.kernels.cpu.pack import PackedLinear, pack, pack_gate_up  # noqa: E402
from presage.kernels.cpu.team import ParkedPool, Team  # noqa: E402
from presage.layers.ops_cpu import pack_planned  # noqa: E402
from presage.quantize.planned import Planned  # noqa: E402
from presage.quantize.schemes import parse_scheme  # noqa: E402
from presage.reproduce.find import commit  # noqa: E402
from presage.reproduce.page import machine  # noqa: E402

HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE = 2048, 32, 8, 64, 8192
WEIGHTS = 3 * HIDDEN * INTERMEDIATE
READ, PEAK, SIZE = 35e9, {"w8a8": 934e9, "bf16": 468e9}, {"w8a8": 1, "bf16": 2}
COPIES = 2
"""Weights used in turn: with attention between them nothing stays in the caches."""
Work = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``context`` tokens beside ``rows`` rows of a GEMM."""

    form: str
    batch: int
    context: int
    rows: int

    def floor(self) -> float:
        """Time in sequence over time at once if memory and arithmetic were always busy."""
        tokens = self.batch * self.context
        attend = tokens * 4 * KV_HEADS * DIM / READ, tokens * 4 * HEADS * DIM / PEAK["bf16"]
        product = WEIGHTS * SIZE[self.form] / READ, 2 * WEIGHTS * self.rows / PEAK[self.form]
        return (max(attend) + max(product)) / max(attend[0] + product[0], attend[1] + product[1])


class Second:
    """The thread of the second core. ``beside`` runs one piece of work there while the caller does another."""

    def __init__(self) -> None:
        self._start, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._work: Work = lambda: None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        while True:
            self._start.acquire()
            self._work()
            self._done.release()

    def beside(self, here: Work, there: Work) -> None:
        """Both at once; returns when both are done."""
        self._work = there
        self._start.release()
        here()
        self._done.acquire()


class Teams:
    """All cores, the first and the second one."""

    def __init__(self) -> None:
        # The parked pool calls its function without the GIL, whatever the size of the work.
        self.both, self.main, self.other = Team(2), Team(1, ParkedPool(1)), Team(1, ParkedPool(1))
        self.second = Second()
        if hasattr(os, "sched_setaffinity"):  # only this thread: the team's worker exists already
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


class Attention:
    """Decode attention over one large cache; spans move through it from call to call, so that nothing is found in the caches."""

    def __init__(self, teams: Teams, tokens: int) -> None:
        arena, self.blocks = Arena(), tokens // 32
        shapes = cache_shapes(self.blocks, KV_HEADS, DIM, torch.bfloat16)
        k, v = (arena.take(2 * torch.Size(s).numel()).view(torch.bfloat16).view(s).normal_() for s in shapes)
        self.by_team = {t: PagedAttention(t, k, v, HEADS, DIM**-0.5) for t in (teams.both, teams.main)}
        self._batches: dict[tuple[int, int, int], AttentionBatch] = {}
        self._permutation = torch.randperm(self.blocks).int()

    def batch(self, place: int, count: int, context: int) -> AttentionBatch:
        """``count`` sequences of one row, from block ``place`` on."""
        key = place, count, context
        if key not in self._batches:
            n = context // 32
            indptr = torch.arange(0, count * n + 1, n, dtype=torch.int32)
            each, full = torch.arange(count, dtype=torch.int32), torch.full((count,), context, dtype=torch.int32)
            blocks = self._permutation[place : place + count * n].clone()
            self._batches[key] = AttentionBatch(indptr, blocks, each, full - 1, full, full)
        return self._batches[key]


def columns(p: PackedLinear, first: int, stop: int) -> PackedLinear:
    """Column blocks [first, stop) of a packed weight, as a weight of its own over the same memory."""
    width = p.columns // (2 if p.gated else 1)
    scales = p.scales_at or p.nbytes
    size = scales // p.blocks
    moved = p.scales_at - first * (size - 4 * p.columns) if p.scales_at else 0
    part = PackedLinear(p.data, min(p.n, stop * width) - first * width, p.k, p.layout, p.gated, moved)
    part.blocks, part.address = stop - first, p.address + first * size
    return part


class Product:
    """gate_up and down of some copies. ``share`` of the multiplications can be asked for: gate_up's columns first, then down's."""

    def __init__(self, form: str, teams: Teams, rows: int) -> None:
        arena, team = Arena(), teams.both
        self.copies: list[tuple[PackedLinear, PackedLinear]] = []
        for _ in range(COPIES):
            gate, up, down = (torch.randn(s) * 0.02 for s in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
            self.copies.append((arena.settle(_packed(form, team, gate, up)), arena.settle(_packed(form, team, down))))
        self.x = torch.randn(rows, HIDDEN).bfloat16()
        self.h = torch.empty(rows, INTERMEDIATE, dtype=torch.bfloat16)
        self.out = torch.empty(rows, HIDDEN)

    def part(self, team: Team, copy: int, start: float, stop: float, rows: slice = slice(None)) -> Work:
        """The multiplications from ``start`` to ``stop``, shares of all, for some rows."""
        todo = []
        for p, x, out, low, high in zip(self.copies[copy], (self.x, self.h), (self.h, self.out), (0, 2 / 3), (2 / 3, 1.0), strict=True):
            width = p.columns // (2 if p.gated else 1)
            a, b = (round(min(1.0, max(0.0, (s - low) / (high - low))) * p.blocks) for s in (start, stop))
            if a < b:
                todo.append((x[rows], columns(p, a, b), out[rows, a * width : b * width], "silu_mul" if p.gated else None))

        def run() -> None:
            for x, p, out, act in todo:
                linear(team, x, p, out, act=act)

        return run


def _packed(form: str, team: Team, *weights: torch.Tensor) -> PackedLinear:
    if form == "bf16":
        return pack(weights[0], form, team) if len(weights) == 1 else pack_gate_up(weights[0], weights[1], form, team)
    return pack_planned([Planned((w,), parse_scheme(form)) for w in weights], team)


class Layer:
    """One case, with every mode as a function of the turn."""

    def __init__(self, case: Case, teams: Teams, attention: Attention, product: Product) -> None:
        self.case, self.teams, self.attention, self.product = case, teams, attention, product
        self.q = torch.randn(case.batch, HEADS, DIM).bfloat16()
        self.out = torch.empty(case.batch, HEADS * DIM, dtype=torch.bfloat16)
        self.turns = max(1, attention.blocks * 32 // (case.batch * case.context))

    def attend(self, team: Team, turn: int, first: int = 0, stop: int | None = None) -> Work:
        """Attention of sequences [first, stop) by a team."""
        c, call = self.case, self.attention.by_team[team]
        stop = c.batch if stop is None else stop
        if first == stop:
            return lambda: None
        n = c.context // 32
        batch = self.attention.batch((turn % self.turns * c.batch + first) * n, stop - first, c.context)
        return lambda: call(self.q[first:stop], batch, self.out[first:stop])

    def sequence(self, turn: int) -> Work:
        """Both parts by both cores."""
        attend, product = self.attend(self.teams.both, turn), self.product.part(self.teams.both, turn % COPIES, 0, 1)

        def run() -> None:
            attend()
            product()

        return run

    def split(self, turn: int, sequences: int, share: float, halves: int = 1) -> Work:
        """Some sequences here beside a share of the multiplications there; what is left by both cores. One of the two must be everything.

        With two halves, that for the first half of the sequences and the last of the rows, then for the others.
        """
        t, copy, batch, rows = self.teams, turn % COPIES, self.case.batch // halves, self.case.rows // halves
        todo = []
        for half in range(halves):
            first, others = half * batch, slice((halves - 1 - half) * rows, (halves - half) * rows)
            middle = first + sequences // halves
            here, there = self.attend(t.main, turn, first, middle), self.product.part(t.other, copy, 0, share, others)
            todo.append((here, there, self.attend(t.both, turn, middle, first + batch), self.product.part(t.both, copy, share, 1, others)))

        def run() -> None:
            for here, there, rest, last in todo:
                t.second.beside(here, there)
                rest()
                last()

        return run


def seconds(work: Work) -> float:
    """Of one run, begun when the team's worker sleeps: then no mode finds a spinning thread on its second core."""
    time.sleep(0.002)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest(make: Callable[[int], Work], repeats: int = 3) -> float:
    """The shortest of some runs, after one that is not counted."""
    make(0)()
    return min(seconds(make(i)) for i in range(1, repeats + 1))


def best_split(layer: Layer) -> tuple[tuple[int, float], float]:
    """((sequences, share of the multiplications) that were fastest, attention on one core over that on both)."""
    t, batch = layer.teams, layer.case.batch
    alone, product = fastest(lambda i: layer.attend(t.main, i)), fastest(lambda i: layer.product.part(t.other, i % COPIES, 0, 1))
    found = []
    for scale in (0.7, 0.85, 1.0, 1.15):
        share, part = min(1.0, scale * alone / product), min(1.0, scale * product / alone)
        cut = (batch, share) if alone < product else (max(1, round(batch * part)), 1.0)
        found.append((fastest(lambda i, cut=cut: layer.split(i, *cut)), cut))  # type: ignore[misc]
    return min(found)[1], alone / fastest(lambda i: layer.attend(t.both, i))


def same(layer: Layer, cut: tuple[int, float]) -> None:
    """Stop if a mode changes a bit."""
    results = []
    for work in (layer.sequence(0), layer.split(0, *cut), layer.split(0, *cut, 2)):
        layer.out.zero_(), layer.product.h.zero_(), layer.product.out.zero_()
        work()
        results.append((layer.out.clone(), layer.product.out.clone()))
    if not all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)):
        raise SystemExit(f"{layer.case}: the modes differ")


def spread(ratios: list[float]) -> str:
    """Median (lowest..highest)."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f}..{max(ratios):.2f})"


def measure(layer: Layer, pairs: int) -> str:
    """One row of the table."""
    c = layer.case
    cut, cores = best_split(layer)
    same(layer, cut)
    modes = (layer.sequence, lambda i: layer.split(i, *cut), lambda i: layer.split(i, *cut, 2))
    times = [[0.0] * len(modes) for _ in range(pairs)]
    for turn, row in enumerate(times):
        for m in sorted(range(len(modes)), reverse=turn % 2 == 1):
            row[m] = seconds(modes[m](turn))
    parts = [fastest(lambda i: layer.attend(layer.teams.both, i)), fastest(lambda i: layer.product.part(layer.teams.both, i % COPIES, 0, 1))]
    taken = " + ".join(f"{1e3 * p:.1f}" for p in parts)
    gains = " | ".join(spread([row[0] / row[m] for row in times]) for m in (1, 2))
    return f"| {c.form} | {c.batch} x {c.context} | {c.rows} | {taken} | {cores:.2f} | {c.floor():.2f} | {cut[0]}, {cut[1]:.2f} | {gains} |"


def numbers(text: str) -> list[int]:
    """Integers with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["w8a8", "bf16"])
    for name, default in (("batches", [16, 64]), ("contexts", [1024, 4096]), ("rows", [64, 256])):
        parser.add_argument(f"--{name}", type=numbers, default=default)
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where, teams = machine(), Teams()
    attention = Attention(teams, max(256 * 1024, max(args.batches) * max(args.contexts)))
    over = statistics.median(seconds(lambda: teams.second.beside(lambda: None, lambda: None)) for _ in range(50))
    print(f"{time.strftime('%Y-%m-%d')} · {where} · commit {commit()} · hand-over {over * 1e6:.0f} us", flush=True)
    print("| weights | attention | rows | attention + GEMM, ms | 1 core | floor | sequences, share | gain of split | gain of nano |")
    print("| --- " * 9 + "|")
    for form in args.formats:
        for rows in args.rows:
            product = Product(form, teams, rows)
            for batch in args.batches:
                for context in args.contexts:
                    print(measure(Layer(Case(form, batch, context, rows), teams, attention, product), args.pairs), flush=True)


if __name__ == "__main__":
    main()
