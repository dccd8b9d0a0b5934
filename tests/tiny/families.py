"""Tiny random checkpoints of every family, written by transformers itself, so that parity is against the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
             "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": 256, "factor": 4.0,
             "partial_rotary_factor": 0.75}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_mqa_tied_bias": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_head_24": ("llama", {"head_dim": 24, "attention_bias": True}),
    "llama_rope_llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_rope_yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama_rope_linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                                "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, "num_hidden_layers": 3}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, "num_hidden_layers": 4,
                                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("phi3", {"sliding_window": 11}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.15}),
}  # fmt: skip
"""Name -> (model_type, changes to SMALL)."""


def small_config(case: str) -> Any:
    """The transformers config of a case."""
    kind, changes = CASES[case]
    base = {} if kind == "gpt2" else dict(SMALL)
    if kind == "phi3":
        base.pop("head_dim")
    return transformers.AutoConfig.for_model(kind, **{**base, **changes}, attn_implementation="eager")


def write_checkpoint(case: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, shard: str = "5GB") -> Any:
    """Write a random checkpoint of a case into ``folder``; returns the transformers model, in ``dtype``, eager attention."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(small_config(case), attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Fresh norms are all ones (or zeros) and fresh biases zeros: a forgotten one would go unnoticed.
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
            del name
    model.save_pretrained(folder, max_shard_size=shard)
    return model
