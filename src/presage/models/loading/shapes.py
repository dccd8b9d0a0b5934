"""Names and shapes of a checkpoint's tensors, from its config alone (``dummy`` weights, memory estimates).

The decoder families with Llama's layout are spelled out; any other architecture is asked of transformers on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from presage.core.errors import UnsupportedModel

Shape = tuple[int, ...]
PLAIN = frozenset(
    {"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite", "olmo2", "olmo3"}
)
SPARSE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"})
FUSED = frozenset({"phi3"})
_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "gemma3_text"})
_QK_NORM_PER_HEAD = frozenset({"qwen3", "qwen3_moe", "gemma3_text"})
_QK_NORM_WHOLE = frozenset({"olmo2", "olmo3", "olmoe"})
_NORMS = {
    "gemma2": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def weight_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Name -> shape of every tensor of a checkpoint with this config. Raises UnsupportedModel if nobody knows the architecture."""
    kind = str(config.get("model_type", ""))
    if kind not in PLAIN | SPARSE | FUSED:
        return _from_transformers(config)
    hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        for norm in _NORMS.get(kind, ("input_layernorm", "post_attention_layernorm")):
            shapes[f"{at}{norm}.weight"] = (hidden,)
        shapes.update((at + "self_attn." + name, shape) for name, shape in _attention(kind, config))
        shapes.update((at + name, shape) for name, shape in _feed_forward(kind, config, layer))
    if not config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def head_dim(config: dict[str, Any]) -> int:
    """Width of one attention head; most configs leave it to hidden_size / num_attention_heads."""
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def _attention(kind: str, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads, width = int(config["hidden_size"]), int(config["num_attention_heads"]), head_dim(config)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    q, kv = heads * width, kv_heads * width
    bias = bool(config.get("attention_bias", False))
    if kind in FUSED:
        yield "qkv_proj.weight", (q + 2 * kv, hidden)
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)) if kind not in FUSED else ():
        yield f"{name}.weight", (rows, hidden)
        # Qwen2 has these three biases always and says so nowhere in its config.
        if bias or kind == "qwen2" or (kind == "qwen2_moe" and config.get("qkv_bias", True)):
            yield f"{name}.bias", (rows,)
    yield "o_proj.weight", (hidden, q)
    if bias:
        yield "o_proj.bias", (hidden,)
    if kind in _QK_NORM_PER_HEAD:
        yield from (("q_norm.weight", (width,)), ("k_norm.weight", (width,)))
    if kind in _QK_NORM_WHOLE:
        yield from (("q_norm.weight", (q,)), ("k_norm.weight", (kv,)))


def _feed_forward(kind: str, config: dict[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    if kind in FUSED:
        yield from (("mlp.gate_up_proj.weight", (2 * wide, hidden)), ("mlp.down_proj.weight", (hidden, wide)))
    elif kind == "mixtral":
        yield from _mixtral(config)
    elif kind in SPARSE and _is_sparse_layer(config, layer):
        yield from _experts(kind, config)
    else:
        yield from _gated("mlp.", wide, hidden, bool(config.get("mlp_bias", False)))


def _gated(at: str, wide: int, hidden: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    for name, shape in (("gate_proj", (wide, hidden)), ("up_proj", (wide, hidden)), ("down_proj", (hidden, wide))):
        yield f"{at}{name}.weight", shape
        if bias:
            yield f"{at}{name}.bias", shape[:1]


def _mixtral(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, wide, experts = int(config["hidden_size"]), int(config["intermediate_size"]), int(config["num_local_experts"])
    yield "block_sparse_moe.gate.weight", (experts, hidden)
    for e in range(experts):
        for name, shape in (("w1", (wide, hidden)), ("w2", (hidden, wide)), ("w3", (wide, hidden))):
            yield f"block_sparse_moe.experts.{e}.{name}.weight", shape


def _is_sparse_layer(config: dict[str, Any], layer: int) -> bool:
    every = int(config.get("decoder_sparse_step") or 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % every == 0


def _experts(kind: str, config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden = int(config["hidden_size"])
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    wide = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    yield "mlp.gate.weight", (experts, hidden)
    for e in range(experts):
        yield from _gated(f"mlp.experts.{e}.", wide, hidden)
    if kind == "qwen2_moe":
        yield from _gated("mlp.shared_expert.", int(config["shared_expert_intermediate_size"]), hidden)
        yield "mlp.shared_expert_gate.weight", (1, hidden)


def _from_transformers(config: dict[str, Any]) -> dict[str, Shape]:
    # Costs seconds, hence only for architectures without a table above.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = str(config.get("model_type", ""))
    try:
        parsed = AutoConfig.for_model(**{**config, "model_type": kind})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise UnsupportedModel(f"model_type {kind!r}: shapes unknown ({' '.join(str(error).split())[:160]})") from None
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if parsed.tie_word_embeddings else set()
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
