"""GGUF tensor names and layouts to Hugging Face's, per architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA2 = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": _BLOCK,
    "qwen2": _BLOCK,
    "qwen3": _BLOCK,
    "gemma2": {**_BLOCK, **_GEMMA2},
}
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(arch: str, name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None for tensors that are no weights (``rope_freqs``) and for unknown ones."""
    if name in TOP:
        return TOP[name]
    match = _IN_BLOCK.fullmatch(name)
    part = ARCHITECTURES[arch].get(match[2]) if match else None
    return f"model.layers.{match[1]}.{part}.{match[3]}" if match and part else None


def undo_layout(arch: str, name: str, tensor: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Undo what the conversion to GGUF did to a tensor (``name`` is Hugging Face's).

    Llama's q and k rows are stored in rotary pairs (2i, 2i + 1) and come back as halves (i, i + D/2); Gemma's norms hold 1 + weight.
    """
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        n = heads if ".q_proj." in name else kv_heads
        rows = tensor.shape[0] // n
        return tensor.reshape(n, rows // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if arch == "gemma2" and name.endswith("norm.weight"):
        return tensor - 1
    return tensor
