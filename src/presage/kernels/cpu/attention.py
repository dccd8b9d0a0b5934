"""Paged attention on the CPU: what a step binds once, what a layer binds once, and the call in between.

    batch = AttentionBatch(indptr, blocks, span_of, index, linear, kv_len, tree, position)     # once a step and KV group
    attention = PagedAttention(team, k_cache, v_cache, heads=32, scale=0.125, window=0)        # once a layer
    attention(q, batch, out)                                                                   # 3 us + the kernel

Cache layouts (Hkv KV heads, D a multiple of 16, blocks of 32 tokens):
    f32:  K [num_blocks, Hkv, D, 32], V [num_blocks, Hkv, 32, D]
    bf16: K [num_blocks, Hkv, D/2, 32, 2] (pairs of dimensions, for the bf16 dot), V [num_blocks, Hkv, 16, D, 2] (pairs of tokens, the
          earlier one second: the dot adds it first)
    int8: K and V [num_blocks, Hkv, 128 + 32 D]: 32 f32 scales, one a token, then the codes: K [D/4, 32, 4] plus 128, V [32, D]
"""

from __future__ import annotations

import struct

import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.attention_plan import BLOCK, FIELDS, MAX_TILE
from presage.kernels.cpu.attention_tiles import attend, scratch_bytes
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.simd_attention import BF16, F32, HEAD, INT8
from presage.kernels.cpu.team import Team
from presage.kernels.reference.kv_copy import cache_shapes

__all__ = ["AttentionBatch", "PagedAttention", "attention_numerics", "cache_geometry", "cache_shapes", "paged_attention", "token_bytes"]

_KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.int8: INT8}
_WIDE = (torch.bfloat16, torch.float32)


def attention_numerics(dtype: torch.dtype) -> str:
    """The numerics id of attention over a cache of this type: it names how scores and weights round."""
    name = {torch.float32: "f32-fma", torch.bfloat16: f"bf16-{current_isa().numerics}", torch.int8: f"int8-{current_isa().numerics}"}[dtype]
    return f"attention-{name}"


def cache_geometry(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int]:
    """(KV heads, D, kind: 0 f32, 1 bf16, 2 int8) of one layer's caches. Raises ConfigError if they are not laid out as above."""
    kind, shape = _KINDS.get(v_cache.dtype, -1), tuple(v_cache.shape)
    kv_heads, dim = (shape[1], shape[3] if kind != INT8 else (shape[2] - HEAD) // BLOCK) if len(shape) == (4, 5, 3)[kind] else (0, 0)
    shapes = cache_shapes(shape[0], kv_heads, dim, v_cache.dtype)
    if k_cache.dtype != v_cache.dtype or kind < 0 or (tuple(k_cache.shape), shape) != shapes:
        found = f"{k_cache.dtype} {tuple(k_cache.shape)}, {v_cache.dtype} {shape}"
        raise ConfigError(f"caches are {found}; expected one type, {shapes}")
    if dim % 16 or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ConfigError(f"caches must be contiguous, with a multiple of 16 dimensions a head, not {dim}")
    return kv_heads, dim, kind


def token_bytes(kind: int, dim: int) -> int:
    """Bytes of one key or value of one head."""
    return dim * (4 >> kind) + (4 if kind == INT8 else 0)


class AttentionBatch:
    """Who attends to what in one step, as addresses. Keeps the tensors alive; they must not change until the step's calls are done.

    ``indptr`` i32[S+1], ``blocks`` i32[*]: block tables. ``span_of``, ``index`` i32[t]: span and KV slot of each row. ``linear``,
    ``kv_len`` i32[S]. ``tree`` u64 (or i64) [t, W]: ancestor bits over keys linear..kv_len-1, or None. ``position`` i32[t]: only needed
    for windows over trees. ``max_kv`` (largest kv_len) is computed if not given. Raises ConfigError on a wrong type.
    """

    def __init__(
        self,
        indptr: torch.Tensor,
        blocks: torch.Tensor,
        span_of: torch.Tensor,
        index: torch.Tensor,
        linear: torch.Tensor | None,
        kv_len: torch.Tensor,
        tree: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
        max_kv: int | None = None,
    ) -> None:
        self._alive = (indptr, blocks, span_of, index, linear, kv_len, tree, position)
        names = ("indptr", "blocks", "span_of", "index", "linear", "kv_len", "position")
        for name, x in zip(names, (*self._alive[:6], position), strict=True):
            if x is not None and (x.dtype != torch.int32 or not x.is_contiguous()):
                raise ConfigError(f"attention: {name} must be a contiguous int32 tensor, not {x.dtype}", param=name)
        if tree is not None and (tree.dtype not in (torch.int64, torch.uint64) or not tree.is_contiguous() or linear is None):
            raise ConfigError("attention: tree must be contiguous 64-bit words, and comes with `linear`", param="tree")
        self.rows = span_of.numel()
        if max_kv is None:
            max_kv = int(kv_len.max()) if kv_len.numel() else 0
        self.max_kv, self._shape, self._need = max_kv, (0, 0), 0
        addresses = [0 if x is None else x.data_ptr() for x in (indptr, blocks, span_of, index, linear, kv_len, tree, position)]
        self.words = (self.rows, *addresses, 0 if tree is None else tree.shape[-1], max_kv)

    def scratch_bytes(self, dim: int, group: int) -> int:
        """Scratch of one thread for heads of ``dim`` dimensions in groups of ``group``; kept, as all layers of a step ask alike."""
        if self._shape != (dim, group):
            self._shape, self._need = (dim, group), scratch_bytes(self.rows, dim, group, self.max_kv)
        return self._need


class PagedAttention:
    """Attention of one layer over its paged cache. The bits of a row depend on its query and its visible keys only.

    ``window`` w > 0 hides keys j <= index - w; ``softcap`` c > 0 makes scores c tanh(s / c); ``sinks`` f32[heads] adds exp(sink) to each
    denominator; ``causal=False`` shows a row all keys below kv_len. ``block_tokens`` (tokens per table entry) is a multiple of 32.
    Raises ConfigError for shapes or types it cannot read.
    """

    def __init__(
        self,
        team: Team,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        heads: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        causal: bool = True,
        block_tokens: int = BLOCK,
    ) -> None:
        kv_heads, dim, kind = cache_geometry(k_cache, v_cache)
        if heads % kv_heads or heads // kv_heads > MAX_TILE or block_tokens % BLOCK:
            raise ConfigError(f"attention: {heads}/{kv_heads} heads of {dim} dimensions, blocks of {block_tokens} tokens are not supported")
        if sinks is not None and (sinks.dtype != torch.float32 or sinks.numel() != heads):
            raise ConfigError("attention: sinks must be one f32 per query head", param="sinks")
        self.team, self.heads, self.dim, self.group = team, heads, dim, heads // kv_heads
        self._alive = (k_cache, v_cache, sinks)
        self._token_bytes = 2 * kv_heads * token_bytes(kind, dim)
        floats = struct.unpack("=q", struct.pack("=ff", scale, softcap))[0]
        keep = 0 if sinks is None else sinks.data_ptr()
        shape = (heads, kv_heads, dim, window, int(causal), block_tokens // BLOCK, floats)
        self._words = (k_cache.data_ptr(), v_cache.data_ptr(), keep, *shape)
        self._table = team.table(FIELDS)
        self._kernel = attend(kind)

    def __call__(self, q: torch.Tensor, batch: AttentionBatch, out: torch.Tensor) -> None:
        """``q`` [t, heads, D] (f32 or bf16; rounded to bf16 or int8 if the cache is) -> ``out`` [t, heads * D] (f32 or bf16), both contiguous."""
        rows, size = batch.rows, batch.rows * self.heads * self.dim
        if q.numel() != size or out.numel() != size or q.dtype not in _WIDE or out.dtype not in _WIDE:
            raise ConfigError(f"attention: {rows} rows, but q is {q.dtype} {tuple(q.shape)} and out {out.dtype} {tuple(out.shape)}")
        if rows == 0:
            return
        need = batch.scratch_bytes(self.dim, self.group)
        scratch = self.team.scratch(need)
        halves = (int(q.dtype == torch.bfloat16), int(out.dtype == torch.bfloat16))
        table = self._table.set(*self._words, *batch.words, q.data_ptr(), out.data_ptr(), *halves, scratch, need)
        self.team.run(self._kernel, table, rows * batch.max_kv * self._token_bytes)


def paged_attention(
    team: Team,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indptr: torch.Tensor,
    blocks: torch.Tensor,
    span_of: torch.Tensor,
    index: torch.Tensor,
    linear: torch.Tensor | None,
    kv_len: torch.Tensor,
    tree: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    position: torch.Tensor | None = None,
    block_tokens: int = BLOCK,
) -> None:
    """One call without binding; `PagedAttention` and `AttentionBatch` say what the arguments mean."""
    layer = PagedAttention(team, k_cache, v_cache, q.shape[1], scale, window, softcap, sinks, causal, block_tokens)
    layer(q, AttentionBatch(indptr, blocks, span_of, index, linear, kv_len, tree, position), out)
