"""The plain-torch twin of paged attention: gathers each span's keys and values and applies an explicit mask. Differentiable."""

from __future__ import annotations

import torch

from presage.kernels.reference.kv_copy import gather_stored, quantise_kv

BLOCK = 32


def visible(
    index: torch.Tensor, linear: int, kv_len: int, tree: torch.Tensor | None, window: int, causal: bool, position: torch.Tensor | None
) -> torch.Tensor:
    """Mask [t, kv_len] of one span's rows: key j is seen iff (j <= index if j < linear else bit j - linear), narrowed by the window."""
    keys = torch.arange(kv_len)
    if not causal:
        seen = torch.ones(len(index), kv_len, dtype=torch.bool)
        linear = kv_len
    else:
        seen = (keys[None] <= index[:, None]) & (keys[None] < linear)
        if tree is not None and linear < kv_len:
            bit = torch.arange(kv_len - linear)
            words = tree.view(torch.int64)[:, bit // 64]
            seen[:, linear:] = ((words >> (bit % 64)) & 1).bool()
    if window:
        place = index if position is None else torch.where(index >= linear, position, index)
        seen &= (keys[None] > place[:, None] - window) | (keys[None] >= linear)
    return seen


def attend_span(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    rounded: bool = False,
) -> torch.Tensor:
    """q [t, Hq, D], k and v [n, Hkv, D], seen [t, n] -> [t, Hq * D] in q's type. A row that sees nothing gives zeros.

    ``v_scale`` [n, Hkv] multiplies the values. ``rounded``: weights (relative to a row's largest, and times ``v_scale``) are rounded to
    bf16 before they are multiplied with values, but not in their sum; the gradient passes the rounding by.
    """
    group = q.shape[1] // k.shape[1]
    # Hidden keys are replaced, not multiplied by zero: freed blocks may hold NaN.
    used = seen.any(0)
    k, v, seen = k[used], v[used], seen[:, used]
    rows = q.unflatten(1, (-1, group))
    s = torch.einsum("thgd,nhd->hgtn", rows, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).view(-1, group, 1, 1).expand(-1, -1, len(q), 1)], -1)
    if s.shape[-1] == 0:
        return q.new_zeros(len(q), q.shape[1] * q.shape[2])
    top = s.detach().amax(-1, keepdim=True)
    p = torch.exp(s - top.masked_fill(top == float("-inf"), 0.0))
    total = p.sum(-1, keepdim=True)
    p = p[..., : k.shape[0]]
    if v_scale is not None:
        p = p * v_scale[used].T[:, None, None].masked_fill(~seen, 0.0)
    total = total.masked_fill(total == 0, 1.0)
    weights = p / total
    if rounded:
        weights = weights + (p.bfloat16().to(p.dtype) / total - weights).detach()
    return torch.einsum("hgtn,nhd->thgd", weights, v).flatten(1)


def paged_attention(
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
    out: torch.Tensor | None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    position: torch.Tensor | None = None,
    block_tokens: int = BLOCK,
) -> torch.Tensor:
    """Twin of the CPU kernel, in f32 (f64 for f64 queries): q [t, Hq, D] -> [t, Hq * D], also copied to ``out`` if given.

    Queries are rounded as the cache's keys are, to bf16 or to int8 with one scale each."""
    wide, kind = q if q.dtype == torch.float64 else q.float(), k_cache.dtype
    if kind == torch.bfloat16:
        wide = wide.bfloat16().to(wide.dtype)
    elif kind == torch.int8:
        codes, unit = quantise_kv(wide.float(), empty=1.0)
        wide = codes.to(wide.dtype) * unit.to(wide.dtype)[..., None]
    result = torch.zeros(q.shape[0], q.shape[1] * q.shape[2], dtype=wide.dtype)
    for s in torch.unique(span_of).tolist():
        rows, n = torch.nonzero(span_of == s)[:, 0], int(kv_len[s])
        table, keys = blocks[int(indptr[s]) : int(indptr[s + 1])].long(), torch.arange(n)
        k, v, *scales = gather_stored(k_cache, v_cache, table[keys // block_tokens] * block_tokens + keys % block_tokens)
        k, v_scale = (k * scales[0][..., None], scales[1].to(wide.dtype)) if scales else (k, None)
        limit = n if tree is None or linear is None else min(n, int(linear[s]))
        bits, place = None if tree is None else tree[rows], None if position is None else position[rows]
        seen = visible(index[rows], limit, n, bits, window, causal, place)
        o = attend_span(wide[rows], k.to(wide.dtype), v.to(wide.dtype), seen, scale, softcap, sinks, v_scale, kind != torch.float32)
        result = result.index_copy(0, rows, o)
    if out is not None:
        out.copy_(result.detach())
    return result
