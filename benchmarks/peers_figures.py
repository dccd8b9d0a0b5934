"""What is compared, and how: every figure asks the engines in turns and takes the median of the paired ratios.

A pair is one measurement of ours and one of the peer's, one right after the other, each on prompts of its own; plain read bandwidth is
taken with each pair. Decode rates are the difference of two output lengths, so that nobody's prefill counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peers_pool import EngineFailed, Pool, Spec, busy

PROMPT = 32
TRIES = 3
DISTURBED = 0.06
"""Share of the cores that others may use during a question; above it, the question is asked again when the machine is quiet."""
CLOSE = 0.75
"""A peer within this share of the best one in the first round is measured in pairs too: one look does not decide who is best."""


@dataclass(slots=True)
class Row:
    """One line of the table. ``value``: median; ``low``, ``high``: spread over pairs; ``at_least``: direction of the target."""

    figure: str
    part: str
    target: float
    unit: str
    at_least: bool = True
    value: float | None = None
    low: float = 0.0
    high: float = 0.0
    note: str = ""
    pairs: list[Any] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """reached, missed, or why there is no number."""
        if self.value is None:
            return "not measured"
        return "reached" if (self.value >= self.target if self.at_least else self.value <= self.target) else "missed"

    def take(self, values: Sequence[float]) -> None:
        """Set median and spread."""
        ordered = sorted(values)
        self.value, self.low, self.high = statistics.median(ordered), ordered[0], ordered[-1]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"verdict": self.verdict}


class Bench:
    """The pool, the engines given, and how often to measure."""

    def __init__(
        self, pool: Pool, own: Sequence[Spec], peers: Sequence[Spec], pairs: int, python: str, lengths: tuple[int, int], patience: float
    ) -> None:
        self.pool, self.own, self.peers, self.pairs, self.python, self.lengths = pool, list(own), list(peers), pairs, python, lengths
        self.patience, self.disturbed = patience, list[float]()
        self.reader = Spec("read", "", python, "-")
        self.seed = int(time.time()) % 1_000_000 * 1000

    def ours(self, variant: str) -> Spec | None:
        """Our engine in a precision."""
        return next((s for s in self.own if s.variant == variant), None)

    def peer(self, kind: str, variant: str) -> Spec | None:
        """A peer in a precision."""
        return next((s for s in self.peers if (s.kind, s.variant) == (kind, variant)), None)

    def ask(self, spec: Spec, keep: Sequence[Spec], method: str, *arguments: Any) -> Any:
        """The answer of an engine, asked again (at most ``TRIES`` times) if others used the machine meanwhile."""
        worker = self.pool.get(spec, [*keep, self.reader])
        for _ in range(TRIES):
            value = worker.ask(method, *arguments)
            if worker.disturbed <= DISTURBED:
                break
            until = time.monotonic() + self.patience
            while busy(0.5) > DISTURBED and time.monotonic() < until:
                time.sleep(1.0)
        self.disturbed.append(worker.disturbed)
        return value

    def read(self) -> float:
        """Plain read bandwidth now, bytes per second."""
        return float(self.ask(self.reader, self.own + self.peers, "read"))

    def fresh(self) -> int:
        """A seed nobody had."""
        self.seed += 1
        return self.seed

    def decode(self, spec: Spec, batch: int, keep: Sequence[Spec] = ()) -> float:
        """Tokens per second of decoding."""
        short, long = self.lengths
        for _ in range(TRIES):
            b = self.ask(spec, keep, "generate", batch, PROMPT, long, self.fresh())
            a = self.ask(spec, keep, "generate", batch, PROMPT, short, self.fresh())
            if b > a:
                return batch * (long - short) / (b - a)
        raise EngineFailed(f"{spec.name}: {long} tokens took less time than {short}, {TRIES} times; the machine is not quiet enough")

    def prefill(self, spec: Spec, length: int, keep: Sequence[Spec] = ()) -> float:
        """Prompt tokens per second, one prompt and its first token."""
        return length / float(self.ask(spec, keep, "generate", 1, length, 1, self.fresh()))

    def rate(self, spec: Spec, case: str, keep: Sequence[Spec] = ()) -> float:
        """``decode-4``, ``prefill-512``, ... of an engine; ``verify-256``: time of 8 rows of one sequence over that of one."""
        what, _, number = case.partition("-")
        if what == "decode":
            return self.decode(spec, int(number), keep)
        if what == "prefill":
            return self.prefill(spec, int(number), keep)
        one, eight = self.ask(spec, keep, "steps", int(number), [1, 8], 9)
        return float(eight / one)

    def compare(self, row: Row, ours: Spec, theirs: Spec, case: str) -> Row:
        """Fill a row with paired ratios of ours over theirs."""
        both = [ours, theirs]
        for i in range(self.pairs):
            row.read.append(self.read())
            first, second = both if i % 2 == 0 else both[::-1]  # whoever goes first finds the machine as the other left it
            found = {spec: self.rate(spec, case, both) for spec in (first, second)}
            row.pairs.append({ours.name: found[ours], theirs.name: found[theirs]})
        row.take([pair[ours.name] / pair[theirs.name] for pair in row.pairs])
        medians = [statistics.median(pair[s.name] for pair in row.pairs) for s in both]
        row.note = f"{ours.name} {medians[0]:.1f} tok/s, {theirs.name} {medians[1]:.1f}"
        return row


def matrix(bench: Bench, cases: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """One measurement of every case on every engine: the overview, and who is best. What an engine cannot do is None."""
    found: dict[str, dict[str, float | None]] = {}
    for spec in [*bench.own, *bench.peers]:
        row: dict[str, float | None] = {}
        for case in cases:
            try:
                row[case] = bench.rate(spec, case) if spec.can(case) else None
            except EngineFailed as error:
                print(error, file=sys.stderr)
                row[case] = None
        found[spec.name] = row
        shown = "  ".join(f"{c} {'-' if v is None else f'{v:.2f}' if c.startswith('verify') else f'{v:.1f}'}" for c, v in row.items())
        print(f"{spec.name:18s} {shown}", flush=True)
    return found


def finalists(found: dict[str, dict[str, float | None]], specs: Sequence[Spec], case: str) -> list[Spec]:
    """The best of ``specs`` in a case and those close to it, best first."""
    rated = [(rate, s) for s in specs if (rate := found.get(s.name, {}).get(case)) is not None]
    best = max((rate for rate, _ in rated), default=0.0)
    return [s for rate, s in sorted(rated, key=lambda r: -r[0]) if rate >= CLOSE * best]


def best_of(bench: Bench, row: Row, case: str, found: dict[str, dict[str, float | None]]) -> Row:
    """Best of ours against the best peer: all close ones are paired with our best, the least ratio counts."""
    ours, peers = finalists(found, bench.own, case), finalists(found, bench.peers, case)
    if not ours or not peers:
        return row
    rows = []
    for peer in peers:
        one = Row(row.figure, row.part, row.target, row.unit)
        rows.append(bench.compare(one, ours[0], peer, case))
    return min(rows, key=lambda r: r.value or 0.0)


def decode_one(bench: Bench) -> list[Row]:
    """Decode at batch 1, precision by precision."""
    rows = []
    sides = (("w4a8", "llama.cpp", "Q4_0", 1.2), ("w8a8", "llama.cpp", "Q8_0", 1.2), ("bf16", "vllm", "bf16", 1.1))
    for variant, kind, other, target in sides:
        row = Row("decode batch 1", f"{variant.upper() if variant != 'bf16' else 'bf16'} vs {kind} {other}", target, "x")
        ours, theirs = bench.ours(variant), bench.peer(kind, other)
        rows.append(bench.compare(row, ours, theirs, "decode-1") if ours and theirs else row)
    return rows


def linear(bench: Bench) -> list[Row]:
    """The W4A8 kernel streamed from memory."""
    aims = ((1, "1 row", 90.0, "% of plain read"), (8, "8 rows", 40.0, "GB/s"), (16, "16 rows", 1.6, "T op/s"))
    spec = Spec("linear", "w4a8", bench.python, "-")
    rows = [Row("W4A8 8192 x 2048 linear", part, target, unit) for _, part, target, unit in aims]
    try:
        bench.pool.get(spec, [bench.reader])
    except EngineFailed as error:
        print(error, file=sys.stderr)
        return rows
    values: list[list[float]] = [[] for _ in aims]
    for _ in range(bench.pairs):
        read = bench.read()
        for (count, _, _, unit), row, into in zip(aims, rows, values, strict=True):
            found = bench.ask(spec, [], "linear", count, 9)
            row.pairs.append(found)
            row.read.append(read)
            scale = {"GB/s": found["bytes_per_second"] / 1e9, "T op/s": found["operations_per_second"] / 1e12}
            into.append(scale.get(unit, 100 * found["bytes_per_second"] / read))
    for row, got in zip(rows, values, strict=True):
        row.take(got)
        share, speed, work = (statistics.median(v) for v in zip(*(
            (p["bytes_per_second"] / r, p["bytes_per_second"], p["operations_per_second"]) for p, r in zip(row.pairs, row.read, strict=True)
        ), strict=True))  # fmt: skip
        row.note = f"{speed / 1e9:.1f} GB/s, {share:.0%} of plain read, {work / 1e12:.2f} T op/s"
    bench.pool.stop(spec)
    return rows


def verify(bench: Bench) -> list[Row]:
    """A whole step with 8 rows of one sequence over one with 1 row."""
    rows, ours = [], bench.ours("w4a8")
    for context, target in ((256, 1.12), (2048, 1.3)):
        row = Row("8 rows of one sequence / 1 row (W4A8)", f"{context:,} tokens of context", target, "x", at_least=False)
        if ours is not None:
            for _ in range(bench.pairs):
                row.read.append(bench.read())
                one, eight = bench.ask(ours, [], "steps", context, [1, 8], 9)
                row.pairs.append([one, eight])
            row.take([eight / one for one, eight in row.pairs])
            one, eight = (statistics.median(p[i] for p in row.pairs) for i in (0, 1))
            row.note = f"{one * 1e3:.1f} ms, {eight * 1e3:.1f} ms"
        rows.append(row)
    return rows


def traffic(bench: Bench) -> list[Row]:
    """Bytes a decode step must read, times its rate, over plain reading."""
    rows = []
    for spec in bench.own:
        row = Row("memory traffic of decode, batch 1 / plain read", spec.variant, 88.0, "%")
        # The mean context of the tokens that the two lengths differ by.
        size = bench.ask(spec, [], "bytes_per_step", PROMPT + sum(bench.lengths) // 2)
        for _ in range(bench.pairs):
            before, rate = bench.read(), bench.decode(spec, 1)
            read = (before + bench.read()) / 2
            row.read.append(read)
            row.pairs.append({"tokens_per_second": rate, "bytes": size})
        row.take([100 * p["tokens_per_second"] * size / read for p, read in zip(row.pairs, row.read, strict=True)])
        row.note = f"{size / 1e6:.0f} MB a step, {statistics.median(p['tokens_per_second'] for p in row.pairs):.1f} tok/s"
        rows.append(row)
    return rows


FIRST = (
    "from presage import LLM, SamplingParams\n"
    "llm = LLM('presage-tiny')\n"
    "print(len(llm.generate('Once upon a time', SamplingParams(max_tokens=1, ignore_eos=True))[0].outputs[0].token_ids))\n"
)


def start_up(bench: Bench) -> list[Row]:
    """From the start of the process to the first token of the bundled model; cold: an empty kernel cache."""

    def once(cache: str) -> float:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        began = time.perf_counter()
        done = subprocess.run([bench.python, "-c", FIRST], env=environment, capture_output=True, text=True, check=False)
        if done.stdout.strip() != "1":
            raise EngineFailed(f"start-up: {done.stderr.strip()[-300:]}")
        return time.perf_counter() - began

    cold = Row("start-up to the first token, bundled model", "cold kernel cache", 60.0, "s", at_least=False)
    warm = Row("start-up to the first token, bundled model", "warm", 4.0, "s", at_least=False)
    with tempfile.TemporaryDirectory() as cache:
        cold.take([once(cache)])
        warm.pairs = [once(cache) for _ in range(max(3, bench.pairs))]
        warm.take(warm.pairs)
    return [cold, warm]


def quality(given: dict[str, float]) -> list[Row]:
    """Perplexity over bf16's, in percent, from ``presage eval perplexity``; ``given`` by precision."""
    rows = []
    for variant, target in (("w8a8", 0.5), ("w4a8", 3.0)):
        row = Row("perplexity vs bf16, bundled model", variant.upper(), target, "% more", at_least=False, note="presage eval perplexity")
        if variant in given:
            row.take([given[variant]])
        rows.append(row)
    return rows


Figure = Callable[[Bench], list[Row]]
FIGURES: dict[str, Figure] = {"decode-1": decode_one, "linear": linear, "verify": verify, "traffic": traffic, "start-up": start_up}
