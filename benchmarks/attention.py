"""Paged attention beside plain memory reads and torch's attention, all within the same minute: trust the ratios.

    python benchmarks/attention.py [threads]

Decode: 8 sequences of 2,048 tokens, 32 / 8 heads of 64, bf16, several layers' caches in turn so that nothing stays in the caches of the
processor. Prefill: 512 rows that end 1,024 keys. Trees: 8 rows a sequence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from presage.kernels.cpu.attention import AttentionBatch, PagedAttention, cache_shapes
from presage.kernels.cpu.team import Team

HEADS, KV_HEADS, DIM = 32, 8, 64


def best(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of some calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def read_speed(threads: int) -> float:
    """GB/s of summing 512 MB, which torch does at the speed of memory."""
    torch.set_num_threads(threads)
    data = torch.zeros(64 << 20, dtype=torch.int64)
    return data.numel() * 8 / best(data.sum) / 1e9


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
    """``count`` layers with caches of their own."""
    made = []
    for _ in range(count):
        k, v = (torch.randn(shape).to(dtype) for shape in cache_shapes(blocks, KV_HEADS, DIM, dtype))
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
    return seconds, sequences * keys * 2 * KV_HEADS * DIM * dtype.itemsize / seconds / 1e9


def torch_decode(keys: int = 2048, sequences: int = 8, layers: int = 4) -> float:
    """GB/s of torch's attention over dense (unpaged) bf16 caches."""
    stack = [[torch.randn(sequences, KV_HEADS, keys, DIM).bfloat16() for _ in range(2)] for _ in range(layers)]
    q = torch.randn(sequences, HEADS, 1, DIM).bfloat16()
    seconds = best(lambda: [torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in stack]) / layers
    return sequences * keys * 2 * KV_HEADS * DIM * 2 / seconds / 1e9


def prefill(team: Team, rows: int = 512, keys: int = 1024) -> tuple[float, float]:
    """(GFLOP/s of ours, of torch's dense attention): counted over visible pairs."""
    visible = sum(range(keys - rows + 1, keys + 1))
    operations = 4 * HEADS * DIM * visible / 1e9
    layer = layers_of(team, keys // 32 + 1, 1, HEADS, torch.bfloat16)[0]
    batch, q, out = batch_of([(keys, rows)]), torch.randn(rows, HEADS, DIM), torch.empty(rows, HEADS * DIM)
    ours = operations / best(lambda: layer(q, batch, out))
    k, v = (torch.randn(1, KV_HEADS, keys, DIM).bfloat16() for _ in range(2))
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    dense = q.bfloat16().transpose(0, 1)[None]
    return ours, operations / best(lambda: torch.nn.functional.scaled_dot_product_attention(dense, k, v, attn_mask=mask, enable_gqa=True))


def overhead(team: Team) -> float:
    """Microseconds of one call on one row and one key."""
    batch, layer = batch_of([(1, 1)]), layers_of(team, 2, 1, HEADS, torch.bfloat16)[0]
    q, out = torch.randn(1, HEADS, DIM), torch.empty(1, HEADS * DIM)

    def thousand() -> None:
        for _ in range(1000):
            layer(q, batch, out)

    return best(thousand) * 1e3


def main() -> None:
    """Print the table."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    team = Team(threads)
    for name, rows, heads, dtype in (
        ("decode, group 4, bf16", 1, 32, torch.bfloat16),
        ("decode, group 1, bf16", 1, 8, torch.bfloat16),
        ("decode, group 7, bf16", 1, 56, torch.bfloat16),
        ("decode, group 4, f32", 1, 32, torch.float32),
        ("8 rows each, group 4, bf16", 8, 32, torch.bfloat16),
    ):
        memory = read_speed(threads)
        seconds, speed = decode(team, rows, heads, dtype)
        work = 4 * 8 * rows * heads * DIM * 2048 / seconds / 1e9
        share = f"{speed / memory:4.0%} of {memory:.1f} GB/s"
        print(f"{name:28s} {seconds * 1e3:7.2f} ms  {speed:5.1f} GB/s  {share}  {work:5.0f} GFLOP/s", flush=True)
    print(f"{'torch decode, group 4, bf16':28s} {'':10s}  {torch_decode():5.1f} GB/s", flush=True)
    ours, theirs = prefill(team)
    print(f"prefill 512 rows over 1,024 keys: {ours:.0f} GFLOP/s, torch {theirs:.0f}; one call on one key: {overhead(team):.1f} us")


if __name__ == "__main__":
    main()
