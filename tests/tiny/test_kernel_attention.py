"""Paged attention on the CPU against its twin and against brute force, over NaN-poisoned caches; and a row's bits, however served."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError
from presage.kernels.cpu.attention import AttentionBatch, PagedAttention, attention_numerics, cache_shapes, paged_attention
from presage.kernels.cpu.team import Team
from presage.kernels.reference import attention as twin
from presage.kernels.reference.kv_copy import gather_kv, quantise_kv, scatter_kv

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
DTYPES = (BF16, F32, INT8)
TEAMS = {n: Team(n) for n in (1, 2, 3)}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small torch operators wait longer for each other's threads than they compute, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def i32(values: Any) -> torch.Tensor:
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A cache of NaN; in int8 the scales are NaN (their bytes are those of -1)."""
    return torch.full(shape, -1 if dtype == INT8 else float("nan"), dtype=dtype)


def as_read(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Queries in float64, rounded as a cache of this type has them rounded."""
    if dtype == INT8:
        codes, unit = quantise_kv(q)
        return codes.double() * unit[..., None].double()
    return q.to(dtype).double()


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal up to float32's rounding; where weights are rounded to bf16, one may fall to the other side of a border: then by a part in 2**8
    of the largest value (4 here), but most outputs have no such weight."""
    if dtype == F32:
        torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=3e-6)
        return
    error = (got.double() - want).abs()
    assert error.max() < 4 * 2**-8
    assert error.median() < 2e-5


@dataclass
class Span:
    """Keys of one sequence and its query rows of this step."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    index: list[int]
    linear: int | None = None
    tree: list[int] | None = None
    position: list[int] | None = None


@dataclass
class World:
    """A paged cache holding some spans; every slot that no row may see is NaN."""

    spans: list[Span]
    dtype: torch.dtype = F32
    window: int = 0
    block_tokens: int = 32
    seed: int = 0
    words: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> World:
        """Lay the spans out in shuffled blocks; entries wholly before every row's window point to the null block."""
        _, heads, dim = self.spans[0].k.shape
        per = self.block_tokens // 32
        counts = [-(-len(s.k) // self.block_tokens) for s in self.spans]
        ids = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.seed)) + 1
        shapes = cache_shapes((sum(counts) + 1) * per, heads, dim, self.dtype)
        self.k, self.v = (poisoned(shape, self.dtype) for shape in shapes)
        tables, indptr = [], [0]
        for s, n in zip(self.spans, counts, strict=True):
            table = ids[indptr[-1] : indptr[-1] + n].clone()
            keys = torch.arange(len(s.k))
            scatter_kv(self.k, self.v, table[keys // self.block_tokens] * self.block_tokens + keys % self.block_tokens, s.k, s.v)
            if self.window:
                table[: max(0, min(s.position or s.index) - self.window + 1) // self.block_tokens] = 0
            tables.append(table)
            indptr.append(indptr[-1] + n)
        tree = [[r >> (64 * w) & (2**64 - 1) for w in range(self.words)] for s in self.spans for r in (s.tree or [0] * len(s.index))]
        has_tree = any(s.tree for s in self.spans)
        self.arguments = {
            "indptr": i32(indptr),
            "blocks": torch.cat(tables).int(),
            "span_of": i32([i for i, s in enumerate(self.spans) for _ in s.index]),
            "index": i32([j for s in self.spans for j in s.index]),
            "linear": i32([len(s.k) if s.linear is None else s.linear for s in self.spans]),
            "kv_len": i32([len(s.k) for s in self.spans]),
            "tree": torch.tensor([[w - 2**64 if w >= 2**63 else w for w in row] for row in tree]) if has_tree else None,
            "position": i32([j for s in self.spans for j in (s.position or s.index)]) if has_tree else None,
        }
        self.q = torch.cat([s.q for s in self.spans])
        return self

    def run(self, threads: int = 2, out_dtype: torch.dtype = F32, **options: Any) -> torch.Tensor:
        """The kernel's output [t, Hq * D]."""
        out = torch.full((len(self.q), self.q.shape[1] * self.q.shape[2]), 7.0, dtype=out_dtype)
        options = {"scale": self.q.shape[-1] ** -0.5, "window": self.window, "block_tokens": self.block_tokens, **options}
        paged_attention(TEAMS[threads], self.q, self.k, self.v, out=out, **self.arguments, **options)
        return out

    def twin(self, **options: Any) -> torch.Tensor:
        """The twin's output, in float64."""
        options = {"scale": self.q.shape[-1] ** -0.5, "window": self.window, "block_tokens": self.block_tokens, **options}
        return twin.paged_attention(self.q.double(), self.k, self.v, out=None, **self.arguments, **options)


def make_span(n: int, rows: int, heads: int, kv_heads: int, dim: int, seed: int) -> Span:
    """A linear span: the last ``rows`` of ``n`` keys are this step's queries."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(n, kv_heads, dim, generator=g), torch.randn(n, kv_heads, dim, generator=g)
    return Span(k, v, torch.randn(rows, heads, dim, generator=g), list(range(n - rows, n)))


def make_tree(prefix: int, parents: list[int], heads: int, kv_heads: int, dim: int, seed: int) -> tuple[Span, list[list[int]]]:
    """A span with a token tree after ``prefix`` keys; node i's parent is parents[i] < i, or -1. Also each node's path from the root."""
    span = make_span(prefix + len(parents), len(parents), heads, kv_heads, dim, seed)
    paths: list[list[int]] = []
    for i, p in enumerate(parents):
        paths.append([*(paths[p] if p >= 0 else []), i])
    span.linear, span.tree = prefix, [sum(1 << j for j in path) for path in paths]
    span.position = [prefix + len(path) - 1 for path in paths]
    return span, paths


def _stored(span: Span, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The span's keys and values in caches of their own, from slot 0 on."""
    n, heads, dim = span.k.shape
    k, v = (poisoned(shape, dtype) for shape in cache_shapes(-(-n // 32), heads, dim, dtype))
    scatter_kv(k, v, torch.arange(n), span.k, span.v)
    return k, v


shapes = st.sampled_from([(4, 4, 16), (7, 1, 80), (8, 2, 64), (16, 1, 96), (6, 2, 48), (4, 2, 128), (2, 1, 256), (5, 1, 32)])
dtypes = st.sampled_from(DTYPES)
lengths = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(shapes, lengths, dtypes, st.sampled_from([0, 0, 1, 33, 60]), st.sampled_from([0.0, 3.0]), st.booleans(), st.booleans())
def test_equals_the_twin_over_poisoned_caches(
    shape: tuple[int, int, int], sizes: list[tuple[int, int]], dtype: torch.dtype, window: int, cap: float, sink: bool, causal: bool
) -> None:
    """Any shape, window, cap, sinks; no NaN leaks from freed blocks or from slots behind the last key."""
    heads, kv_heads, dim = shape
    window = window if causal else 0
    world = World([make_span(n, min(n, r), heads, kv_heads, dim, i) for i, (n, r) in enumerate(sizes)], dtype, window).build()
    options: dict[str, Any] = {"softcap": cap, "sinks": torch.linspace(-2, 2, heads) if sink else None, "causal": causal}
    got, want = world.run(**options), world.twin(**options)
    assert torch.isfinite(got).all()
    assert_near(got, want, dtype)


def test_bf16_queries_and_outputs() -> None:
    """bf16 in gives the bits of the same values in f32; bf16 out is the f32 output rounded; over every cache."""
    for dtype in DTYPES:
        world = World([make_span(70, 9, 8, 2, 64, 0)], dtype).build()
        world.q = world.q.bfloat16()
        half = world.run(out_dtype=BF16)
        world.q = world.q.float()
        assert torch.equal(half, world.run().bfloat16())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 70), st.data(), dtypes, st.sampled_from([0, 5, 40]))
def test_trees_equal_brute_force(prefix: int, data: st.DataObject, dtype: torch.dtype, window: int) -> None:
    """A tree row sees the prefix (as far as its window reaches) and exactly its ancestors; trees may be larger than one word."""
    size = data.draw(st.sampled_from([1, 6, 30, 80]))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(size)]
    span, paths = make_tree(prefix, parents, 4, 2, 32, 1)
    world = World([span, make_span(45, 3, 4, 2, 32, 2)], dtype, window, words=2)
    world.spans[1].tree, world.spans[1].linear = [0, 0, 0], 45
    got = world.build().run()[:size]
    slots = torch.arange(len(span.k))
    k, v = (x.double() for x in gather_kv(*_stored(span, dtype), slots))
    q = as_read(span.q, dtype)
    for i, path in enumerate(paths):
        first = max(0, prefix + len(path) - 1 - window + 1) if window else 0
        keys = [*range(min(first, prefix), prefix), *(prefix + j for j in path)]
        scores = torch.einsum("hd,nhd->hn", q[i], k[keys].repeat_interleave(2, 1)) / 32**0.5
        want = torch.einsum("hn,nhd->hd", scores.softmax(-1), v[keys].repeat_interleave(2, 1)).flatten()
        if dtype == F32:
            torch.testing.assert_close(got[i].double(), want, atol=3e-6, rtol=3e-6)
        else:
            # Brute force does not round its weights.
            torch.testing.assert_close(got[i].double(), want, atol=4 * 2**-9, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_chunking(dtype: torch.dtype) -> None:
    """Rows of a prompt served whole, in chunks of 32 and 7, and one by one are equal bit for bit."""
    whole = make_span(77, 77, 7, 1, 48, 3)
    want = World([whole], dtype).build().run()
    for chunk in (1, 7, 32):
        for start in range(0, 77, chunk):
            stop = min(77, start + chunk)
            part = Span(whole.k[:stop], whole.v[:stop], whole.q[start:stop], list(range(start, stop)))
            assert torch.equal(World([part], dtype, seed=start).build().run(), want[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_mates_threads_or_block_size(dtype: torch.dtype) -> None:
    """Permuted spans give permuted outputs; teams of 1, 2, 3 and table entries of 32, 64, 96 tokens give the same bits."""
    spans = [make_span(n, r, 8, 2, 64, n) for n, r in ((130, 1), (64, 64), (33, 5), (1, 1), (200, 17))]
    want = World(spans, dtype).build().run(1)
    for threads, tokens in ((2, 32), (3, 32), (2, 64), (1, 96)):
        assert torch.equal(World(spans, dtype, block_tokens=tokens, seed=threads).build().run(threads), want)
    pieces = want.split([len(s.index) for s in spans])
    order = [3, 0, 4, 2, 1]
    assert torch.equal(World([spans[i] for i in order], dtype, seed=9).build().run(2), torch.cat([pieces[i] for i in order]))


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accepted_path_has_the_bits_of_plain_decoding(dtype: torch.dtype, window: int) -> None:
    """Tokens of a path scattered over a tree's slots, with rejected NaN branches between them, equal sequential rows bit for bit."""
    prefix, size = 61, 90
    path = [0, 3, 4, 31, 50, 64, 89]
    parents = [-1 if i == 0 else 0 for i in range(size)]
    for a, b in itertools.pairwise(path):
        parents[b] = a
    span, paths = make_tree(prefix, parents, 8, 2, 64, 5)
    assert paths[89] == path
    kept = [prefix + j for j in path]
    others = [prefix + j for j in range(size) if j not in path]
    span.k[others], span.v[others] = float("nan"), float("nan")
    got = World([span], dtype, window, words=2).build().run()[path]
    keys = [*range(prefix), *kept]
    plain = Span(span.k[keys], span.v[keys], span.q[path], list(range(prefix, prefix + len(path))))
    assert torch.isfinite(got).all()
    assert torch.equal(got, World([plain], dtype, window, seed=4).build().run())


@pytest.mark.parametrize("dtype", [BF16, INT8])
def test_bits_do_not_depend_on_the_height_of_a_tile(dtype: torch.dtype) -> None:
    """Beyond 2,048 keys tiles are halved: rows that a longer batch mate does not change stay equal."""
    span = make_span(2300, 40, 4, 1, 16, 6)
    want = World([span], dtype).build().run()
    single = [Span(span.k[: i + 1], span.v[: i + 1], span.q[r : r + 1], [i]) for r, i in enumerate(span.index)]
    assert torch.equal(World(single[:3] + single[-2:], dtype).build().run(), want[[0, 1, 2, 38, 39]])
    assert_near(want, World([span], dtype).build().twin(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_nan_row_hurts_nobody_else(dtype: torch.dtype) -> None:
    """A later row of the same chunk with NaN keys and values leaves earlier rows as they are; its own output is NaN."""
    span = make_span(50, 20, 4, 2, 32, 7)
    want = World([span], dtype).build().run()
    span.k[40], span.v[40] = float("nan"), float("nan")
    got = World([span], dtype).build().run()
    assert torch.equal(got[:10], want[:10])
    assert torch.isnan(got[10:]).all()


def test_extreme_scores_and_a_row_that_sees_nothing() -> None:
    """Scores of +-1e4 neither overflow nor lose the maximum; a tree row without its own bit gives zeros."""
    span = make_span(40, 4, 4, 2, 32, 8)
    span.q *= 3e3
    world = World([span], F32).build()
    torch.testing.assert_close(world.run().double(), world.twin(), atol=1e-3, rtol=1e-3)
    blind, _ = make_tree(0, [-1, 0], 4, 2, 32, 9)
    blind.tree = [0, 2]
    out = World([blind], F32).build().run()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.isfinite(out[1]).all() and bool(out[1].any())


def test_bound_calls_serve_many_batches_and_no_rows() -> None:
    """One bound layer, several batches of different size, an empty one included."""
    world = World([make_span(70, 30, 8, 2, 64, 1)], BF16).build()
    layer = PagedAttention(TEAMS[2], world.k, world.v, 8, 0.125)
    a = world.arguments
    want = world.run(scale=0.125)
    for rows in (30, 0, 1, 17):
        batch = AttentionBatch(a["indptr"], a["blocks"], a["span_of"][:rows], a["index"][:rows], a["linear"], a["kv_len"])
        out = torch.empty(rows, 512)
        layer(world.q[:rows], batch, out)
        assert torch.equal(out, want[:rows])


def test_wrong_arguments_are_typed_errors() -> None:
    """Shapes and types that the kernel would misread are refused before it starts."""
    world = World([make_span(10, 2, 4, 2, 64, 1)], BF16).build()
    a = world.arguments
    with pytest.raises(ConfigError, match="int32"):
        AttentionBatch(a["indptr"].long(), a["blocks"], a["span_of"], a["index"], a["linear"], a["kv_len"])
    with pytest.raises(ConfigError, match="not supported"):
        PagedAttention(TEAMS[1], world.k, world.v, 3, 1.0)
    with pytest.raises(ConfigError, match="caches are"):
        PagedAttention(TEAMS[1], world.v, world.k, 4, 1.0)
    batch = AttentionBatch(a["indptr"], a["blocks"], a["span_of"], a["index"], a["linear"], a["kv_len"])
    with pytest.raises(ConfigError, match="rows"):
        PagedAttention(TEAMS[1], world.k, world.v, 4, 1.0)(world.q[:1], batch, torch.empty(2, 256))


def test_numerics_name_the_dot() -> None:
    """Two machines agree on bits only if these names agree."""
    assert attention_numerics(BF16) in ("attention-bf16-dot", "attention-bf16-fma")
    assert attention_numerics(F32) == "attention-f32-fma"
    assert attention_numerics(INT8) in ("attention-int8-dot", "attention-int8-fma")


def test_the_twin_is_differentiable() -> None:
    """Gradients of the twin equal finite differences in float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 4), (5, 2, 4), (5, 2, 4)))
    seen = twin.visible(i32([2, 3, 4]), 5, 5, None, 3, True, None)
    assert torch.autograd.gradcheck(lambda a, b, c: twin.attend_span(a, b, c, seen, 0.5, 2.0), (q, k, v))
    exact, rounded = (torch.autograd.grad(twin.attend_span(q, k, v, seen, 0.5, rounded=r).sum(), q)[0] for r in (False, True))
    torch.testing.assert_close(rounded, exact, atol=1e-12, rtol=1e-12)
