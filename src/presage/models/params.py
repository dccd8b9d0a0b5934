"""What a config.json says, as plain data: sizes, windows, rotary settings. Imports no torch, so the simulator budgets the same model.

Reads the forms of all transformers versions (``rope_theta`` + ``rope_scaling`` and ``rope_parameters``; ``torch_dtype`` and ``dtype``).
Defaults for keys a checkpoint leaves out are those of its family.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

from presage.core.errors import CheckpointError, UnsupportedModel

Config = dict[str, Any]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2")
"""Supported values of ``model_type``; ``gemma3`` (text and vision) runs as its text half."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_ROPE_ALIAS = {"su": "longrope", "mrope": "mrope"}

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face activation names -> ours (the names kernels know)."""


@dataclass(frozen=True)
class RopeParams:
    """Rotary settings of a layer: ``dim`` rotated dimensions per head (the first ones), ``extra`` = the scaling rule's own numbers."""

    dim: int
    theta: float = 10000.0
    type: str = "default"
    extra: tuple[tuple[str, Any], ...] = ()
    trained: int = 0

    def get(self, key: str, default: Any = None) -> Any:
        """A number of the scaling rule; ``default`` if absent or null."""
        value = dict(self.extra).get(key)
        return default if value is None else value


@dataclass(frozen=True)
class MoEParams:
    """Experts of a layer: ``ff`` columns each, ``top_k`` chosen; ``normalise`` = their weights sum to 1."""

    experts: int
    top_k: int
    ff: int
    normalise: bool = True


@dataclass(frozen=True)
class Params:
    """Sizes of a decoder. ``windows[i]`` 0 = layer i sees everything, w = the last w tokens. ``ropes[i]`` None = no rotary.

    ``scale`` multiplies q.k; ``softcap`` and ``final_softcap`` 0 = none; ``moe[i]`` None = a dense MLP of ``ff`` columns.
    """

    model_type: str
    vocab_size: int
    layers: int
    d: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    max_len: int
    eps: float
    act: str
    scale: float
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    embed_scale: float = 1.0
    softcap: float = 0.0
    final_softcap: float = 0.0
    windows: tuple[int, ...] = ()
    ropes: tuple[RopeParams | None, ...] = ()
    moe: tuple[MoEParams | None, ...] = ()
    dtype: str = "bfloat16"
    fingerprint: bytes = field(default=b"", repr=False)

    @property
    def q_dim(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Columns of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    def layer_elements(self, layer: int) -> int:
        """Weights of the linears of one layer (all experts)."""
        attention = self.d * (self.q_dim + 2 * self.kv_dim) + self.q_dim * self.d
        moe, planes = self.moe[layer], 3 if self.gated else 2
        if moe is None:
            return attention + planes * self.d * self.ff
        return attention + moe.experts * (planes * self.d * moe.ff + self.d)

    def elements(self) -> int:
        """Weights of the model; a tied head counts once."""
        return sum(self.layer_elements(i) for i in range(self.layers)) + self.vocab_size * self.d * (1 if self.tied else 2)

    def limited(self, max_len: int | None) -> Params:
        """The same model serving at most ``max_len`` tokens. Raises UnsupportedModel if learned positions end earlier."""
        if max_len is None or max_len == self.max_len:
            return self
        if max_len > self.max_len and self.model_type == "gpt2":
            raise UnsupportedModel(f"max_model_len {max_len} is beyond the model's {self.max_len} learned positions", param="max_model_len")
        return replace(self, max_len=max_len)


def parse(config: Any) -> Params:
    """Params of a config.json dict (or of an object with ``to_dict``). Raises UnsupportedModel naming the type or option,
    CheckpointError naming a key that is missing."""
    c: Config = dict(config if isinstance(config, dict) else config.to_dict())
    kind = c.get("model_type", "")
    if kind == "gemma3":
        c = {**dict(c.get("text_config") or {}), "torch_dtype": c.get("torch_dtype") or c.get("dtype"), "model_type": "gemma3_text"}
        kind = "gemma3_text"
    if kind not in FAMILIES:
        raise UnsupportedModel(f"model type {kind!r} is not supported; supported: {', '.join(FAMILIES)}", param="model")
    try:
        params = _gpt2(c) if kind == "gpt2" else _llama_like(c, kind)
    except KeyError as missing:
        raise CheckpointError(f"config.json of a {kind} model lacks {missing}", param="model") from None
    return replace(params, fingerprint=hashlib.sha256(repr(sorted(c.items(), key=lambda kv: kv[0])).encode()).digest()[:16])


_DEFAULTS: dict[str, Config] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
                "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768, "head_dim": 128},
    "qwen3_moe": {"sliding_window": 4096, "max_position_embeddings": 32768, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768, "num_key_value_heads": 4},
    "gemma2": {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
               "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
               "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2, "tie_word_embeddings": True,
               "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
                    "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
                    "tie_word_embeddings": True, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}  # fmt: skip


def _llama_like(given: Config, kind: str) -> Params:
    c: Config = {"rms_norm_eps": 1e-6, "hidden_act": "silu", **_DEFAULTS.get(kind, {}), **given}
    d, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    # Gemma writes its activation under a second name, and an old hidden_act beside it that was never used.
    act = c.get("hidden_activation") or ("gelu_pytorch_tanh" if kind.startswith("gemma") else c["hidden_act"])
    head_dim = c.get("head_dim") or d // heads
    gemma, bias = kind.startswith("gemma"), bool(c.get("attention_bias"))
    scale = float(c["query_pre_attn_scalar"]) ** -0.5 if gemma else head_dim**-0.5
    windows = _windows(c, kind, layers)
    params = Params(
        model_type=kind, vocab_size=c["vocab_size"], layers=layers, d=d, heads=heads, kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim, ff=c["intermediate_size"], max_len=c["max_position_embeddings"], eps=c["rms_norm_eps"],
        act=activation(act), scale=scale, tied=bool(c.get("tie_word_embeddings", False)), qkv_bias=bias or kind == "qwen2",
        o_bias=bias, mlp_bias=bool(c.get("mlp_bias")), embed_scale=math.sqrt(d) if gemma else 1.0,
        softcap=float(c.get("attn_logit_softcapping") or 0.0), final_softcap=float(c.get("final_logit_softcapping") or 0.0),
        windows=windows, ropes=_ropes(c, kind, head_dim, windows), moe=_moe(c, kind, layers), dtype=_dtype(c),
    )  # fmt: skip
    if c.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention is not supported: decoding needs causal attention", param="model")
    return params


def _gpt2(c: Config) -> Params:
    d, layers, heads = c.get("n_embd", 768), c.get("n_layer", 12), c.get("n_head", 12)
    for option, wanted in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True), ("add_cross_attention", False)):
        if bool(c.get(option, wanted)) != wanted:
            raise UnsupportedModel(f"gpt2 option {option}={c[option]} is not supported", param="model")
    return Params(
        model_type="gpt2", vocab_size=c.get("vocab_size", 50257), layers=layers, d=d, heads=heads, kv_heads=heads, head_dim=d // heads,
        ff=c.get("n_inner") or 4 * d, max_len=c.get("n_positions", 1024), eps=c.get("layer_norm_epsilon", 1e-5),
        act=activation(c.get("activation_function", "gelu_new")), scale=(d // heads) ** -0.5, tied=bool(c.get("tie_word_embeddings", True)),
        qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, windows=(0,) * layers, ropes=(None,) * layers, moe=(None,) * layers,
        dtype=_dtype(c),
    )  # fmt: skip


def activation(name: str) -> str:
    """Our name of a Hugging Face activation. Raises UnsupportedModel."""
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}", param="hidden_act")
    return ACTIVATIONS[name]


def _dtype(c: Config) -> str:
    name = str(c.get("dtype") or c.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return "float32" if name == "float32" else "bfloat16"


def _windows(c: Config, kind: str, layers: int) -> tuple[int, ...]:
    width = int(c.get("sliding_window") or 0)
    if kind in ("qwen2", "qwen3", "qwen3_moe") and not c.get("use_sliding_window"):
        width = 0
    if not width or kind in ("llama", "olmo2"):
        return (0,) * layers
    types = c.get("layer_types")
    if kind in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        types = None
    if types is None:
        types = ["sliding_attention" if _slides(c, kind, i) else "full_attention" for i in range(layers)]
    return tuple(width if t == "sliding_attention" else 0 for t in types)


def _slides(c: Config, kind: str, layer: int) -> bool:
    if kind in ("qwen2", "qwen3"):
        return layer >= int(c["max_window_layers"])
    if kind.startswith("gemma"):
        pattern = c.get("_sliding_window_pattern") or c["sliding_window_pattern"]
        return bool((layer + 1) % int(pattern))
    return True


def _ropes(c: Config, kind: str, head_dim: int, windows: tuple[int, ...]) -> tuple[RopeParams, ...]:
    given = c.get("rope_parameters")
    if kind != "gemma3_text":
        rules = dict(given or c.get("rope_scaling") or {})
        return (_rope(c, rules, head_dim, c.get("rope_theta", 10000.0)),) * len(windows)
    given = given or {}
    full = dict(given.get("full_attention") or c.get("rope_scaling") or {})
    local = dict(given.get("sliding_attention") or {})
    wide, near = _rope(c, full, head_dim, c["rope_theta"]), _rope(c, local, head_dim, c["rope_local_base_freq"])
    return tuple(near if w else wide for w in windows)


def _rope(c: Config, rules: Config, head_dim: int, theta: float) -> RopeParams:
    kind = rules.pop("rope_type", None) or rules.pop("type", None) or "default"
    rules.pop("type", None)
    kind = _ROPE_ALIAS.get(kind, kind)
    if c["model_type"] == "phi3" and kind == "yarn":
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}", param="rope_scaling")
    theta = rules.pop("rope_theta", None) or theta
    factor = rules.pop("partial_rotary_factor", None) or c.get("partial_rotary_factor") or 1.0
    trained = rules.get("original_max_position_embeddings") or c.get("original_max_position_embeddings") or c["max_position_embeddings"]
    rules.setdefault("max_position_embeddings", c["max_position_embeddings"])
    extra = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in rules.items())) if kind != "default" else ()
    return RopeParams(int(head_dim * factor), float(theta), kind, extra, int(trained))


def _moe(c: Config, kind: str, layers: int) -> tuple[MoEParams | None, ...]:
    if kind == "mixtral":
        return (MoEParams(c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"]),) * layers
    if kind != "qwen3_moe":
        return (None,) * layers
    dense, every = set(c.get("mlp_only_layers") or ()), int(c.get("decoder_sparse_step") or 1)
    experts = c.get("num_local_experts") or c["num_experts"]
    moe = MoEParams(experts, c["num_experts_per_tok"], c["moe_intermediate_size"], bool(c.get("norm_topk_prob", False)))
    return tuple(moe if i not in dense and (i + 1) % every == 0 else None for i in range(layers))
