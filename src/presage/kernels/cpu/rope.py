"""From one projection row to attention's inputs: per-head norms, rotary, and the write of K and V into the paged cache, in one kernel.

    write = RopeWrite(team, k_cache, v_cache, cos_sin, q_norm=..., eps=...)      # once a layer
    write(qkv, positions, slots, q_out)                                         # qkv f32 [t, (Hq + 2 Hkv) D], laid out q | k | v

Rotary (Su et al., arXiv 2104.09864) turns pairs of the first ``rot_dim`` dimensions by the angles of a row's position: halves against
halves ("neox") or neighbours (``interleaved``). ``cos_sin`` f32 [max_pos, rot_dim] holds rot_dim/2 cosines, then as many sines.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from presage.core.errors import ConfigError
from presage.kernels.cpu.attention import cache_geometry, token_bytes
from presage.kernels.cpu.attention_plan import LEAST
from presage.kernels.cpu.cache import device, kernel, subroutine
from presage.kernels.cpu.norm import inverse_rms
from presage.kernels.cpu.prepare import row_limit
from presage.kernels.cpu.region import HEADER, enter, share, team_size
from presage.kernels.cpu.simd import (
    broadcast_f32,
    get_f32,
    get_i32,
    get_i64,
    get_u16,
    load_f32,
    load_f32_n,
    set_f32,
    set_i32,
    store_bf16,
    store_f32,
    store_f32_n,
    store_i8,
)
from presage.kernels.cpu.simd_attention import BF16, F32, HEAD, INT8, set_u16
from presage.kernels.cpu.simd_int import round_i8
from presage.kernels.cpu.team import Team

BLOCK = 32
_K, _V, _TABLE, _Q_NORM, _K_NORM, _KV_HEADS, _DIM, _ROT, _INTER, _WHOLE, _KIND, _FLOATS = range(HEADER, HEADER + 12)
_QKV, _STRIDE, _POSITIONS, _SLOTS, _Q_OUT, _Q_HALF, _ROWS, _HEADS, _SCRATCH, _SCRATCH_BYTES = range(HEADER + 12, HEADER + 22)
_FIELDS = 22
_token_bytes = device(token_bytes)


@device
def _scaled(source, weight, inverse, offset, dim, head):  # type: ignore[no-untyped-def]
    """head[0:dim] = source (times inverse times (weight + offset) if there is a weight)."""
    for d in range(0, dim, 16):
        x = load_f32(source, d)
        if weight != 0:
            x = x * broadcast_f32(inverse) * (load_f32(weight, d) + broadcast_f32(offset))
        store_f32(head, d, x)


@device
def _rotate(head, angles, rot, interleaved):  # type: ignore[no-untyped-def]
    """Turn the pairs of the first ``rot`` dimensions in place."""
    half = rot // 2
    if interleaved:
        for i in range(half):
            x, y, c, s = get_f32(head, 2 * i), get_f32(head, 2 * i + 1), get_f32(angles, i), get_f32(angles, half + i)
            set_f32(head, 2 * i, x * c - y * s)
            set_f32(head, 2 * i + 1, y * c + x * s)
        return
    for i in range(0, half, 16):
        n = 16 if half - i > 16 else half - i
        x, y = load_f32_n(head, i, n), load_f32_n(head, half + i, n)
        c, s = load_f32_n(angles, i, n), load_f32_n(angles, half + i, n)
        store_f32_n(head, i, x * c - y * s, n)
        store_f32_n(head, half + i, y * c + x * s, n)


@device
def _put_row(out, head, dim, half):  # type: ignore[no-untyped-def]
    for d in range(0, dim, 16):
        if half:
            store_bf16(out, d, load_f32(head, d))
        else:
            store_f32(out, d, load_f32(head, d))


@device
def _quantised(source, dim, codes):  # type: ignore[no-untyped-def]
    """A head as int8 in -127..127; returns its scale. One NaN in it makes the scale NaN."""
    limit = row_limit(source, 0, dim)
    factor = broadcast_f32(np.float32(127.0) / limit if limit >= LEAST else np.float32(0.0))
    for d in range(0, dim, 16):
        store_i8(codes, d, round_i8(load_f32(source, d) * factor))
    return np.float32(0.0) if limit < LEAST else limit / np.float32(127.0)


@subroutine
def _put_key(block, offset, head, spare, dim, kind):  # type: ignore[no-untyped-def]
    """Spread a key over its block: tokens are the fastest axis there, so every 4 bytes (1 f32, 2 bf16, 4 int8) go 128 bytes apart."""
    flip = 0
    if kind == INT8:
        set_f32(block, offset, _quantised(head, dim, spare))
        block, flip = block + HEAD, 0x80808080
    elif kind == BF16:
        _put_row(spare, head, dim, True)
    source = head if kind == F32 else spare
    for i in range(dim >> kind):
        set_i32(block, i * BLOCK + offset, get_i32(source, i) ^ flip)


@subroutine
def _put_value(block, offset, source, spare, dim, kind):  # type: ignore[no-untyped-def]
    """A value lies in one piece, except that two bf16 tokens alternate. Stores are no wider than what is this token's: the other one may be
    another thread's."""
    if kind == INT8:
        set_f32(block, offset, _quantised(source, dim, block + HEAD + offset * dim))
    elif kind == F32:
        _put_row(block + 4 * offset * dim, source, dim, False)
    else:
        _put_row(spare, source, dim, True)
        first = offset // 2 * 2 * dim + 1 - offset % 2
        for d in range(dim):
            set_u16(block, first + 2 * d, get_u16(spare, d))


@subroutine
def _write_head(table, row, h, heads, q_inverse, k_inverse, head):  # type: ignore[no-untyped-def]
    """One head of one row: heads 0..Hq-1 are queries, then keys, then values."""
    dim, kv_heads, kind = get_i64(table, _DIM), get_i64(table, _KV_HEADS), get_i64(table, _KIND)
    rot, offset, eps = get_i64(table, _ROT), get_f32(table, 2 * _FLOATS + 1), get_f32(table, 2 * _FLOATS)
    slot = get_i64(get_i64(table, _SLOTS), row) if h >= heads else 0
    if slot < 0:
        return
    source = get_i64(table, _QKV) + 4 * (row * get_i64(table, _STRIDE) + h * dim)
    lane = h - heads if h < heads + kv_heads else h - heads - kv_heads
    tile = (slot // BLOCK * kv_heads + lane) * BLOCK * _token_bytes(kind, dim)
    if h >= heads + kv_heads:
        _put_value(get_i64(table, _V) + tile, slot % BLOCK, source, head, dim, kind)
        return
    weight, inverse, first = get_i64(table, _Q_NORM), q_inverse, h
    if h >= heads:
        weight, inverse, first = get_i64(table, _K_NORM), k_inverse, lane
    if weight != 0:
        if get_i64(table, _WHOLE) != 0:
            weight += 4 * dim * first
        else:
            inverse = inverse_rms(source, dim, np.float32(0.0), eps)
    _scaled(source, weight, inverse, offset, dim, head)
    if rot != 0:
        angles = get_i64(table, _TABLE) + 4 * rot * get_i32(get_i64(table, _POSITIONS), row)
        _rotate(head, angles, rot, get_i64(table, _INTER) != 0)
    if h < heads:
        q_half = get_i64(table, _Q_HALF)
        _put_row(get_i64(table, _Q_OUT) + (row * heads + h) * dim * (2 if q_half else 4), head, dim, q_half)
    else:
        _put_key(get_i64(table, _K) + tile, slot % BLOCK, head, head + 4 * dim, dim, kind)


@kernel
def _rope_write():  # type: ignore[no-untyped-def]
    def run(table):  # type: ignore[no-untyped-def]
        rank, size, heads, kv_heads = enter(table), team_size(table), get_i64(table, _HEADS), get_i64(table, _KV_HEADS)
        head, rows, each = get_i64(table, _SCRATCH) + rank * get_i64(table, _SCRATCH_BYTES), get_i64(table, _ROWS), heads + 2 * kv_heads
        zero = np.float32(0.0)
        if get_i64(table, _WHOLE) == 0:
            start, stop = share(rows * each, rank, size)
            for item in range(start, stop):
                _write_head(table, item // each, item % each, heads, zero, zero, head)
            return
        start, stop = share(rows, rank, size)
        dim, eps = get_i64(table, _DIM), get_f32(table, 2 * _FLOATS)
        for row in range(start, stop):
            q = get_i64(table, _QKV) + 4 * row * get_i64(table, _STRIDE)
            q_inverse = inverse_rms(q, heads * dim, zero, eps)
            k_inverse = inverse_rms(q + 4 * heads * dim, kv_heads * dim, zero, eps)
            for h in range(each):
                _write_head(table, row, h, heads, q_inverse, k_inverse, head)

    return run


class RopeWrite:
    """Norms, rotary and cache write of one layer.

    ``q_norm``, ``k_norm``: f32 [D] (each head by itself, qwen3) or f32 [heads * D] (the whole projection, olmo2), times 1 + weight if
    ``plus_one``. ``cos_sin`` None: no rotary. ``k_cache`` and ``v_cache`` None: queries only (a layer that reads another layer's KV);
    then ``dim`` must be given. Raises ConfigError for shapes or types it cannot read.
    """

    def __init__(
        self,
        team: Team,
        k_cache: torch.Tensor | None,
        v_cache: torch.Tensor | None,
        cos_sin: torch.Tensor | None,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
        plus_one: bool = False,
        interleaved: bool = False,
        dim: int = 0,
    ) -> None:
        if k_cache is not None and v_cache is not None:
            self.kv_heads, self.dim, kind = cache_geometry(k_cache, v_cache)
        else:
            self.kv_heads, self.dim, kind = 0, dim, 0
        self.team, self.whole = team, any(x is not None and x.numel() != self.dim for x in (q_norm, k_norm))
        self._sizes = tuple(None if x is None else x.numel() for x in (q_norm, k_norm))
        rot = 0 if cos_sin is None else cos_sin.shape[-1]
        if self.dim < 16 or self.dim % 16 or rot % 2 or rot > self.dim:
            raise ConfigError(f"rope: {self.dim} dimensions a head with {rot} rotated are not supported")
        self._alive = (k_cache, v_cache, cos_sin, q_norm, k_norm)
        for x in self._alive:
            if x is not None and (not x.is_contiguous() or (x.dtype != torch.float32 and x is not k_cache and x is not v_cache)):
                raise ConfigError(f"rope: tables and norms must be contiguous f32, not {x.dtype} {tuple(x.shape)}")
        floats = struct.unpack("=q", struct.pack("=ff", eps, float(plus_one)))[0]
        flags = (self.kv_heads, self.dim, rot, int(interleaved), int(self.whole), kind, floats)
        self._words = (*(0 if x is None else x.data_ptr() for x in self._alive), *flags)
        self._table = team.table(_FIELDS)
        self._kernel = _rope_write()

    def __call__(self, qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor | None, q_out: torch.Tensor | None) -> None:
        """Rotate and store ``qkv`` f32 [t, (Hq + 2 Hkv) D]; ``positions`` i32 [t]; ``slots`` i64 [t] (-1: K and V of that row are not
        written); ``q_out`` f32 or bf16 [t, Hq, D], None if the rows hold no queries."""
        rows, width = qkv.shape
        heads = width // self.dim - 2 * self.kv_heads
        if qkv.dtype != torch.float32 or qkv.stride(1) != 1 or width % self.dim or heads < 0 or (heads > 0) != (q_out is not None):
            raise ConfigError(f"rope: rows of {width} {qkv.dtype} do not hold heads of {self.dim} and {self.kv_heads} KV heads")
        if positions.dtype != torch.int32 or positions.numel() != rows:
            raise ConfigError(f"rope: positions must be int32 [{rows}]", param="positions")
        if self.kv_heads and (slots is None or slots.dtype != torch.int64 or slots.numel() != rows):
            raise ConfigError(f"rope: slots must be int64 [{rows}]", param="slots")
        if q_out is not None and (q_out.numel() != rows * heads * self.dim or not q_out.is_contiguous()):
            raise ConfigError(f"rope: q_out is {tuple(q_out.shape)} for {rows} rows of {heads} heads", param="q_out")
        if self.whole and self._sizes not in ((heads * self.dim, self.kv_heads * self.dim), (heads * self.dim, None)):
            raise ConfigError(f"rope: norms of {self._sizes} weights over {heads} and {self.kv_heads} heads of {self.dim}")
        need = 8 * self.dim
        q_words = (0, 0) if q_out is None else (q_out.data_ptr(), int(q_out.dtype == torch.bfloat16))
        where = (qkv.data_ptr(), qkv.stride(0), positions.data_ptr(), 0 if slots is None else slots.data_ptr(), *q_words)
        table = self._table.set(*self._words, *where, rows, heads, self.team.scratch(need), need)
        self.team.run(self._kernel, table, 8 * rows * width)


def rope_write(
    team: Team,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    q_out: torch.Tensor | None,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slots: torch.Tensor | None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    interleaved: bool = False,
    dim: int = 0,
) -> None:
    """One call without binding, see `RopeWrite`."""
    RopeWrite(team, k_cache, v_cache, cos_sin, q_norm, k_norm, eps, plus_one, interleaved, dim)(qkv, positions, slots, q_out)
