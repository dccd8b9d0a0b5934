"""llama2.c checkpoints (legacy format and its tokenizer file) to a Hugging Face folder, for tests with real trained weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from presage.tokenize.gguf_vocab import build

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab", "seq_len")


def convert_llama2c(bin_path: Path, tok_path: Path, out_dir: Path) -> Path:
    """Write config.json, model.safetensors and tokenizer files into ``out_dir`` and return it."""
    raw = bin_path.read_bytes()
    head = dict(zip(HEADER, struct.unpack("<7i", raw[:28]), strict=True))
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(np.frombuffer(raw, np.float32, offset=28), head)
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    (out_dir / "config.json").write_text(json.dumps(_config(head)))
    tokenizer, config = _tokenizer(tok_path, abs(head["vocab"]))
    tokenizer.save(str(out_dir / "tokenizer.json"))
    (out_dir / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return out_dir


def _tensors(flat: np.ndarray, h: dict[str, int]) -> dict[str, torch.Tensor]:
    dim, wide, layers, width = h["dim"], h["hidden_dim"], h["n_layers"], h["dim"] // h["n_heads"]
    kv, vocab, at = h["n_kv_heads"] * width, abs(h["vocab"]), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return torch.from_numpy(flat[at - count : at].reshape(shape).copy())

    embed = take(vocab, dim)
    stacks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": _halves(take(layers, dim, dim), h["n_heads"]),
        "self_attn.k_proj": _halves(take(layers, kv, dim), h["n_kv_heads"]),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, wide, dim),
        "mlp.down_proj": take(layers, dim, wide),
        "mlp.up_proj": take(layers, wide, dim),
    }
    out = {"model.embed_tokens.weight": embed, "model.norm.weight": take(dim)}
    at += h["seq_len"] * width  # two tables of rotary angles that nobody reads
    if h["vocab"] < 0:
        out["lm_head.weight"] = take(vocab, dim)
    for name, stack in stacks.items():
        out.update({f"model.layers.{i}.{name}.weight": stack[i].contiguous() for i in range(layers)})
    return out


def _halves(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaved rotary rows (2i, 2i + 1) to halves (i, i + D/2)."""
    layers, rows, dim = w.shape
    return w.view(layers, heads, rows // heads // 2, 2, dim).transpose(2, 3).reshape(layers, rows, dim)


def _config(h: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": abs(h["vocab"]),
        "hidden_size": h["dim"],
        "intermediate_size": h["hidden_dim"],
        "num_hidden_layers": h["n_layers"],
        "num_attention_heads": h["n_heads"],
        "num_key_value_heads": h["n_kv_heads"],
        "max_position_embeddings": h["seq_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": h["vocab"] > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _tokenizer(path: Path, vocab: int) -> tuple[Tokenizer, dict[str, Any]]:
    """The file holds (score, bytes) per token: what GGUF calls a ``llama`` tokenizer, so its builder makes this one too."""
    raw, at = path.read_bytes(), 4
    tokens, scores = [], []
    for _ in range(vocab):
        score, length = struct.unpack_from("<fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace"))
        scores.append(score)
        at += 8 + length
    tokens = ["<unk>", "<s>", "</s>", *(t.replace(" ", "\u2581") for t in tokens[3:])]
    types = [2, 3, 3, *(6 if t.startswith("<0x") and len(t) == 6 else 1 for t in tokens[3:])]
    meta = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    return build(lambda key, default=None: meta.get(key, default), str(path))
