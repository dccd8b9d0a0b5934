"""The sizes of a model that cost time and memory, from any Hugging Face config.json. Families need not be ones the engine can run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from presage.cache.geometry import size_pools
from presage.core.errors import ConfigError, NotEnoughMemory
from presage.core.kv import BLOCK_TOKENS, KVGeometry, KVGroup

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """A decoder. ``kv_dim``: numbers kept per token and layer (2 x kv_heads x head_dim; the latent and rotary part under MLA).

    ``experts`` 0 = dense; ``expert_ff`` columns each, ``top_k`` per token, ``shared_ff`` columns every token passes; the first
    ``dense_layers`` layers are dense all the same. ``window`` 0 = full attention, on ``windowed`` of the layers. ``score_dim``,
    ``value_dim``: lengths of the dot products per head in attention. ``attention``: weights of the attention block (numbers).
    """

    name: str
    layers: int
    d: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocab: int
    max_len: int
    attention_in: int
    attention_out: int
    kv_dim: int
    score_dim: int
    value_dim: int
    gated: bool = True
    tied: bool = False
    experts: int = 0
    top_k: int = 0
    expert_ff: int = 0
    shared_ff: int = 0
    dense_layers: int = 0
    window: int = 0
    windowed: int = 0
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def ff_mats(self) -> int:
        """Matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def mlp_numbers(self) -> int:
        """Weights of all MLPs and routers."""
        dense = self.layers - (self.layers - self.dense_layers if self.experts else 0)
        sparse = self.layers - dense
        per_sparse = self.ff_mats * self.d * (self.experts * self.expert_ff + self.shared_ff) + self.d * self.experts
        return dense * self.ff_mats * self.d * self.ff + sparse * per_sparse

    @property
    def numbers(self) -> int:
        """Weights, norms and biases aside."""
        return self.layers * (self.attention_in + self.attention_out) + self.mlp_numbers + self.vocab * self.d * (1 if self.tied else 2)

    @property
    def bytes(self) -> float:
        """Bytes of the weights."""
        return self.numbers * self.weight_bytes

    def kv_token_bytes(self) -> float:
        """KV bytes of one token over all layers."""
        return self.layers * self.kv_dim * self.kv_bytes

    def geometry(
        self, memory: float, *, tp: int = 1, block_size: int = BLOCK_TOKENS, max_num_seqs: int = 128, max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None, utilization: float = 0.9, num_blocks: int | None = None,
    ) -> KVGeometry:  # fmt: skip
        """KV pools of ``tp`` devices of ``memory`` bytes each: what ``utilization`` leaves above the weights. Raises NotEnoughMemory.

        Under tensor parallelism heads are split (replicated once there are fewer than ranks), so one block costs a rank its share.
        """
        share = max(1 / tp, 1 / self.kv_heads)
        groups = []
        for count, window in ((self.layers - self.windowed, 0), (self.windowed, self.window)):
            if count:
                size = int(block_size * count * self.kv_dim * self.kv_bytes * share)
                where = tuple((i, i) for i in range(count))
                sizes = {"heads": self.kv_heads, "head_dim": self.head_dim, "block_bytes": size, "block_tokens": block_size, "window": window}
                groups.append(KVGroup(layers=where, **sizes))  # type: ignore[arg-type]
        if num_blocks is not None:
            return KVGeometry(groups=tuple(groups), num_blocks=(num_blocks,) * len(groups))
        room = int(memory * utilization - self.bytes / tp)
        if room <= 0:
            have = memory * utilization / 1e9
            raise NotEnoughMemory(f"{self.name} needs {self.bytes / tp / 1e9:.1f} GB a device for weights, {have:.1f} are there")
        return size_pools(tuple(groups), room, max_num_seqs, max_num_batched_tokens, max_model_len or self.max_len)

    @classmethod
    def of(cls, config: str | Path | dict[str, Any], weights: str | None = None, kv: str | None = None) -> ModelShape:
        """From a config.json (path or dict); ``weights`` and ``kv`` name number formats. Raises ConfigError if a size is missing."""
        from presage.simulate.latency.hardware import BYTES

        c = json.loads(Path(config).read_text()) if not isinstance(config, dict) else config
        c = {**c, **c.get("text_config", {})}
        try:
            return _shape(c, BYTES[weights or "bfloat16"], BYTES[kv or "bfloat16"])
        except KeyError as error:
            raise ConfigError(f"the model configuration has no {error.args[0]}", param="model") from None


def _shape(c: dict[str, Any], weight_bytes: float, kv_bytes: float) -> ModelShape:
    d, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    kv_heads, dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or d // heads
    experts = next((c[k] for k in _EXPERTS if c.get(k)), 0)
    expert_ff = c.get("moe_intermediate_size") or c.get("intermediate_size", 0)
    shared = c.get("shared_expert_intermediate_size") or (c.get("n_shared_experts") or 0) * expert_ff
    window = (c.get("sliding_window") or 0) if c.get("use_sliding_window", True) else 0
    kinds = c.get("layer_types") or (["sliding_attention"] * layers if window else [])
    windowed = sum(k == "sliding_attention" for k in kinds)
    return ModelShape(
        name=c.get("_name_or_path") or c.get("model_type", "model"),
        layers=layers,
        d=d,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        ff=c.get("intermediate_size", 0),
        vocab=c["vocab_size"],
        max_len=c.get("max_position_embeddings", 4096),
        tied=bool(c.get("tie_word_embeddings", False)),
        experts=experts,
        top_k=c.get("num_experts_per_tok", 0) if experts else 0,
        expert_ff=expert_ff if experts else 0,
        shared_ff=shared if experts else 0,
        dense_layers=c.get("first_k_dense_replace", 0) if experts else 0,
        window=window,
        windowed=windowed if window else 0,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        **(_latent(c, d, heads) if c.get("kv_lora_rank") else _grouped(d, heads, kv_heads, dim)),  # type: ignore[arg-type]
    )


def _grouped(d: int, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    return {
        "attention_in": d * (heads + 2 * kv_heads) * dim,
        "attention_out": heads * dim * d,
        "kv_dim": 2 * kv_heads * dim,
        "score_dim": dim,
        "value_dim": dim,
    }


def _latent(c: dict[str, Any], d: int, heads: int) -> dict[str, int]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed form: queries meet the latent itself."""
    rank, rope, nope, value, q = c["kv_lora_rank"], c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"], c.get("q_lora_rank") or 0
    queries = d * q + q * heads * (nope + rope) if q else d * heads * (nope + rope)
    return {
        "attention_in": queries + d * (rank + rope) + heads * nope * rank,
        "attention_out": heads * value * rank + heads * value * d,
        "kv_dim": rank + rope,
        "score_dim": rank + rope,
        "value_dim": rank,
    }
