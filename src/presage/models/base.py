"""A causal decoder as a declaration: embed, layers made of stages, head, fill. A family overrides the hooks in which it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from presage.core.kv import KVGroup
from presage.layers.attention import Attention, AttentionSpec, QKNorm
from presage.layers.decoder import DecoderLayer, Half
from presage.layers.kv.geometry import kv_groups, stored_dtype
from presage.layers.linear import Linear
from presage.layers.mlp import MLP
from presage.layers.norm import Norm, RMSNorm
from presage.layers.ops import Ops, Weight
from presage.layers.rope import Rope
from presage.layers.state import LayerContext, State, Workspace
from presage.models.params import Params, RopeParams
from presage.models.weights import LLAMA_NAMES, Shape, Weights, part_shapes
from presage.quantize.canonical import Canonical, dense
from presage.quantize.planned import Planned
from presage.quantize.schemes import Scheme, parse_scheme

Progress = Callable[[int, int], None]


class Model:
    """``layers``: tuple of DecoderLayer; ``vocab_size``; ``max_len``; ``params``. Weights are packed one at a time while it is built.

    Hooks of a family: ``names``, ``roots``, ``norm_offset``, ``norm``, ``qk_norm``, ``attention``, ``mlp``, ``layer``.
    """

    names: Mapping[str, str] = LLAMA_NAMES
    roots: tuple[str, ...] = ("model.", "")
    norm_offset = 0.0

    def __init__(
        self, params: Params, weights: Weights, ops: Ops, salt: bytes = b"", progress: Progress | None = None, scheme: Scheme | None = None
    ) -> None:
        self.params, self.weights, self.ops, self._salt, self.scheme = params, weights, ops, salt, scheme
        self.vocab_size, self.max_len = params.vocab_size, params.max_len
        self._ropes: dict[RopeParams, Rope] = {}
        self.embedding = dense(weights.get("embed"), ops.dtype)
        layers = []
        for i in range(params.layers):
            layers.append(self.layer(i))
            if progress is not None:
                progress(i + 1, params.layers)
        self.layers: tuple[DecoderLayer, ...] = tuple(layers)
        self.final = self.norm("norm")
        self.lm_head = Linear(ops, "head", [self.weight("embed" if params.tied else "head", head=True)], softcap=params.final_softcap)

    def kv_groups(self, block_size: int = 32, kv_cache_dtype: str = "auto") -> tuple[KVGroup, ...]:
        """KV groups of the plain method for blocks of ``block_size`` tokens, stored as ``CacheConfig.kv_cache_dtype`` says."""
        dtype = stored_dtype(kv_cache_dtype, "bfloat16" if self.ops.dtype == torch.bfloat16 else "float32")
        return kv_groups(self.params, dtype, block_size, self._salt + f"{self.ops.numerics}|{self.scheme.name if self.scheme else ''}".encode())

    # -- hooks -------------------------------------------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, params: Params) -> dict[str, Shape]:
        """Shapes of the checkpoint's tensors by part."""
        return part_shapes(params)

    def norm(self, part: str, i: int = 0) -> Norm:
        """A norm of the family's kind."""
        return RMSNorm(self.ops, self.weights.tensor(part, i), self.params.eps, self.norm_offset)

    def linear(self, name: str, parts: tuple[str, ...], i: int, act: str = "") -> Linear:
        """Parts of the checkpoint fused into one linear, with their biases."""
        return Linear(self.ops, name, [self.weight(p, i) for p in parts], [self.weights.maybe(p, i) for p in parts], act)

    def weight(self, part: str, i: int = 0, expert: int = 0, head: bool = False) -> Weight:
        """A matrix as its linear layer packs it: to be quantised as the scheme says unless it is already; routers stay as they are."""
        w, scheme = self.matrix(part, i, expert), self.scheme
        if scheme is None or not isinstance(w, torch.Tensor) or part == "router":
            return w
        return Planned((w,), parse_scheme(scheme.head) if head else scheme)

    def matrix(self, part: str, i: int = 0, expert: int = 0) -> torch.Tensor | Canonical:
        """A matrix [outputs, inputs] of the checkpoint."""
        return self.weights.get(part, i, expert=expert)

    def rope(self, i: int) -> Rope | None:
        """The rotary table of layer i; layers with equal settings share one."""
        rope = self.params.ropes[i]
        if rope is None:
            return None
        if rope not in self._ropes:
            self._ropes[rope] = Rope(rope, self.max_len)
        return self._ropes[rope]

    def qk_norm(self, i: int) -> QKNorm | None:
        """Norms of queries and keys, if the family has them."""
        return None

    def spec(self, i: int) -> AttentionSpec:
        """Heads, scale, window and softcap of layer i."""
        p = self.params
        return AttentionSpec(p.heads, p.kv_heads, p.head_dim, p.scale, p.windows[i], p.softcap)

    def attention(self, i: int, before: Norm | None, after: Norm | None = None) -> Attention:
        """The attention half of layer i."""
        qkv, o = self.linear("qkv", ("q", "k", "v"), i), self.linear("o", ("o",), i)
        return Attention(self.spec(i), qkv, o, self.rope(i), before, after, self.qk_norm(i))

    def mlp(self, i: int, before: Norm | None, after: Norm | None = None) -> Half:
        """The other half of layer i."""
        up = self.linear("gate_up", ("gate", "up"), i, act=f"{self.params.act}_mul")
        return MLP(up, self.linear("down", ("down",), i), before, after)

    def layer(self, i: int) -> DecoderLayer:
        """Layer i: norm, attention, norm, MLP."""
        return DecoderLayer(self.attention(i, self.norm("norm1", i)), self.mlp(i, self.norm("norm2", i)))

    # -- what the walk calls ----------------------------------------------------------------------------------------------------------

    def embed(self, ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Ids and positions int32 [t] -> residual stream [t, d] float32."""
        self.ops.embedding(ids, self.embedding, self.params.embed_scale, out)

    def final_norm(self, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The last hidden state [t, d] of residual rows, in the type of ``out``."""
        return self.final(h, out)

    def head(self, h: torch.Tensor, work: Workspace) -> torch.Tensor:
        """Logits [t, V] float32 of residual rows h [t, d]; valid until the next call."""
        return self.lm_head(h, work.take("logits", h.shape[0], self.vocab_size, torch.float32), norm=self.final)

    def fill(self, state: State, contexts: list[LayerContext]) -> None:
        """Keys and values of the given layers for rows that will never run them (SwiftKV, early exit)."""
        for c in contexts:
            self.layers[c.layer].fill(state, c)
