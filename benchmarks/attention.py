"""Paged attention beside plain memory reads and torch's attention: trust the ratios, whose reads are made just before and after.

    python benchmarks/attention.py [threads]

32 / 8 heads of 64. Decode: 8 sequences of 2,048 tokens, several layers' caches in turn so that nothing stays in the caches of the processor.
Verification: 8 rows of one sequence of 2,048 tokens, as a multiple of one row's time. Prefill: 1,024 tokens at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from presage.kernels.cpu.attention import AttentionBatch, PagedAttention, cache_shapes, token_bytes
from presage.kernels.cpu.memory import Arena
from presage.kernels.cpu.team import Team
from presage.kernels.reference.kv_copy import scatter_kv

HEADS, KV_HEADS, DIM = 32, 8, 64
TYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "f32": torch.float32}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def best(call: Callable[[], object], repeats: int = 9) -> float:
    """Seconds of the fastest of some calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


class Reads:
    """Summing 512 MB in huge pages, which torch does at the speed of memory."""

    def __init__(self, threads: int) -> None:
        self.data, self.threads = Arena().take(512 << 20).view(torch.int64).fill_(1), threads

    def speed(self) -> float:
        """GB/s."""
        torch.set_num_threads(self.threads)
        return self.data.nbytes / best(self.data.sum, 5) / 1e9


def batch_of(spans: list[tuple[int, int]]) -> AttentionBatch:
    """Spans of (keys, rows) over shuffled blocks; rows are the last ones."""
    counts = [-(-n // 32) for n, _ in spans]
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    blocks = (torch.randperm(sum(counts)) + 1).int()
    span_of = torch.tensor([s for s, (_, r) in enumerate(spans) for _ in range(r)], dtype=torch.int32)
    index = torch.tensor([j for n, r in spans for j in range(n - r, n)], dtype=torch.int32)
    kv_len = torch.tensor([n for n, _ in spans], dtype=torch.int32)
    return AttentionBatch(indptr, blocks, span_of, index, kv_len, kv_len)


def layers_of(team: Team, blocks: int, count: int, heads: int, dtype: torch.dtype) -> list[PagedAttention]:
    """``count`` layers with caches of their own, in memory as the engine's are."""
    made, arena, slots = [], Arena(), torch.arange(32 * blocks)
    tokens = [torch.randn(32 * blocks, KV_HEADS, DIM) for _ in range(2)]
    for _ in range(count):
        shapes = cache_shapes(blocks, KV_HEADS, DIM, dtype)
        k, v = (arena.take(dtype.itemsize * torch.Size(s).numel()).view(dtype).view(s) for s in shapes)
        scatter_kv(k, v, slots, *tokens)
        made.append(PagedAttention(team, k, v, heads, DIM**-0.5))
    return made


def decode(
    team: Team, rows: int, heads: int, dtype: torch.dtype, keys: int = 2048, sequences: int = 8, layers: int = 4
) -> tuple[float, float]:
    """(seconds a layer, GB/s) of ``rows`` rows in each of the sequences."""
    batch = batch_of([(keys, rows)] * sequences)
    stack = layers_of(team, sequences * keys // 32 + 1, layers, heads, dtype)
    q, out = torch.randn(sequences * rows, heads, DIM), torch.empty(sequences * rows, heads * DIM)

    def step() -> None:
        for layer in stack:
            layer(q, batch, out)

    seconds = best(step) / layers
    return seconds, sequences * keys * 2 * KV_HEADS * token_bytes(KINDS[dtype], DIM) / seconds / 1e9


def torch_decode(keys: int = 2048, sequences: int = 8, layers: int = 4) -> float:
    """GB/s of torch's attention over dense (unpaged) bf16 caches."""
    stack = [[torch.randn(sequences, KV_HEADS, keys, DIM).bfloat16() for _ in range(2)] for _ in range(layers)]
    q = torch.randn(sequences, HEADS, 1, DIM).bfloat16()
    seconds = best(lambda: [torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in stack]) / layers
    return sequences * keys * 2 * KV_HEADS * DIM * 2 / seconds / 1e9


def prefill(team: Team, dtype: torch.dtype, rows: int = 1024, keys: int = 1024) -> float:
    """GFLOP/s, counted over visible pairs."""
    visible = sum(range(keys - rows + 1, keys + 1))
    layer = layers_of(team, keys // 32 + 1, 1, HEADS, dtype)[0]
    batch, q, out = batch_of([(keys, rows)]), torch.randn(rows, HEADS, DIM), torch.empty(rows, HEADS * DIM)
    return 4 * HEADS * DIM * visible / 1e9 / best(lambda: layer(q, batch, out))


def torch_prefill(rows: int = 1024) -> float:
    """The same of torch's dense causal attention in bf16."""
    q, k, v = (torch.randn(1, h, rows, DIM).bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS))
    operations = 4 * HEADS * DIM * rows * (rows + 1) / 2 / 1e9
    return operations / best(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 3)


def overhead(team: Team) -> float:
    """Microseconds of one call on one row and one key."""
    batch, layer = batch_of([(1, 1)]), layers_of(team, 2, 1, HEADS, torch.bfloat16)[0]
    q, out = torch.randn(1, HEADS, DIM), torch.empty(1, HEADS * DIM)

    def thousand() -> None:
        for _ in range(1000):
            layer(q, batch, out)

    return best(thousand) * 1e3


def main() -> None:
    """Print the tables."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    team, reads = Team(threads), Reads(threads)
    for group, kind in ((4, "bf16"), (1, "bf16"), (7, "bf16"), (4, "int8"), (1, "int8"), (4, "f32")):
        before = reads.speed()
        seconds, speed = decode(team, 1, group * KV_HEADS, TYPES[kind])
        memory = max(before, reads.speed())
        print(f"decode, group {group}, {kind}  {seconds * 1e3:6.2f} ms  {speed:5.1f} GB/s  {speed / memory:4.0%} of {memory:.1f} GB/s", flush=True)
    for kind in ("bf16", "int8"):
        one, eight = (decode(team, rows, HEADS, TYPES[kind], sequences=1, layers=16)[0] for rows in (1, 8))
        work = 4 * 8 * HEADS * DIM * 2048 / eight / 1e9
        print(f"8 rows of one sequence, {kind}: {eight * 1e3:.3f} ms, {eight / one:.2f} x one row's {one * 1e3:.3f} ms, {work:.0f} GFLOP/s")
        print(f"prefill of 1,024 tokens, {kind}: {prefill(team, TYPES[kind]):.0f} GFLOP/s", flush=True)
    print(f"torch: decode {torch_decode():.1f} GB/s, prefill {torch_prefill():.0f} GFLOP/s; one call on one key: {overhead(team):.1f} us")


if __name__ == "__main__":
    main()
