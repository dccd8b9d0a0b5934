"""GGUF metadata to the config.json that Hugging Face would have written for the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.models.loading.gguf_names import ARCHITECTURES

Meta = Callable[[str, Any], Any]
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
_LLAMA3_CANDIDATES = tuple((factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0, 16.0, 4.0))


def gguf_config(meta: Meta, shapes: Mapping[str, tuple[int, ...]], rope_freqs: np.ndarray | None, where: str) -> dict[str, Any]:
    """config.json as a dict. ``meta(key, default)`` reads metadata (``{arch}`` in the key is filled in); ``shapes`` go by GGUF name.

    Raises UnsupportedModel for architectures we do not map and CheckpointError for missing metadata.
    """
    arch = str(meta("general.architecture", ""))
    if arch not in ARCHITECTURES:
        raise UnsupportedModel(f"{where}: GGUF architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    if meta("{arch}.expert_count", 0):
        raise UnsupportedModel(f"{where}: GGUF files with experts are not supported; use the safetensors checkpoint")
    config = _sizes(meta, shapes, where)
    config.update(model_type=arch, architectures=[_CLASSES[arch]], torch_dtype="bfloat16", hidden_act="silu")
    config.update(_rope(meta, rope_freqs, config["head_dim"], where))
    config.update(_tokens(meta))
    if arch == "gemma2":
        config.update(_gemma2(meta, config))
    return config


def _sizes(meta: Meta, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    def need(key: str) -> int:
        value = meta(key, None)
        if not isinstance(value, int):
            raise CheckpointError(f"{where}: metadata {key.replace('{arch}.', '*.')} is missing or not one number")
        return value

    hidden, heads = need("{arch}.embedding_length"), need("{arch}.attention.head_count")
    return {
        "hidden_size": hidden,
        "intermediate_size": need("{arch}.feed_forward_length"),
        "num_hidden_layers": need("{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta("{arch}.attention.head_count_kv", heads)),
        "head_dim": int(meta("{arch}.attention.key_length", hidden // heads)),
        "max_position_embeddings": need("{arch}.context_length"),
        "rms_norm_eps": _exact(meta("{arch}.attention.layer_norm_rms_epsilon", 1e-5)),
        "vocab_size": shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else int(meta("{arch}.vocab_size", 0)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }


def _exact(value: float) -> float:
    """GGUF stores float32; 9.99999974e-06 was meant as 1e-05."""
    return float(f"{value:.6g}")


def _rope(meta: Meta, rope_freqs: np.ndarray | None, head_dim: int, where: str) -> dict[str, Any]:
    theta = _exact(float(meta("{arch}.rope.freq_base", 10000.0)))
    out: dict[str, Any] = {"rope_theta": theta}
    kind, factor = str(meta("{arch}.rope.scaling.type", "none")), float(meta("{arch}.rope.scaling.factor", 0.0) or 0.0)
    if rope_freqs is not None:
        out["rope_scaling"] = _llama3(rope_freqs.astype(np.float64), theta, head_dim, where)
    elif kind in ("linear", "yarn") and factor:
        out["rope_scaling"] = {"rope_type": kind, "factor": factor}
        original = meta("{arch}.rope.scaling.original_context_length", None)
        if kind == "yarn" and original:
            out["rope_scaling"]["original_max_position_embeddings"] = int(original)
    elif kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{where}: rope scaling {kind!r} is not supported in GGUF")
    return out


def _llama3(divisors: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """Llama 3.1 files hold the result of frequency scaling (one divisor per frequency), not its parameters: find them again."""
    for factor, low, high, original in _LLAMA3_CANDIDATES:
        if np.allclose(_llama3_divisors(theta, head_dim, factor, low, high, original), divisors, rtol=1e-4):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return {"rope_type": "llama3", **dict(zip(names, (factor, low, high, original), strict=True))}
    raise UnsupportedModel(f"{where}: rope_freqs.weight is not Llama 3's frequency scaling")


def _llama3_divisors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    wave = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _tokens(meta: Meta) -> dict[str, Any]:
    """Token ids; a chat model's end of turn (``eot``, ``eom``) ends generation as the end of text does."""
    out: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        value = meta(f"tokenizer.ggml.{key}", None)
        if value is not None:
            out[name] = int(value)
    ends = [meta(f"tokenizer.ggml.{key}", None) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    known = list(dict.fromkeys(int(e) for e in ends if e is not None))
    if known:
        out["eos_token_id"] = known if len(known) > 1 else known[0]
    return out


def _gemma2(meta: Meta, config: dict[str, Any]) -> dict[str, Any]:
    # The 27B model (46 layers) scales queries by hidden/heads, the others by the head's width; GGUF does not record which.
    scalar = config["hidden_size"] // config["num_attention_heads"] if config["num_hidden_layers"] == 46 else config["head_dim"]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": _exact(meta("gemma2.attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _exact(meta("gemma2.final_logit_softcapping", 30.0)),
        "sliding_window": int(meta("gemma2.attention.sliding_window", 4096)),
        "query_pre_attn_scalar": scalar,
    }
