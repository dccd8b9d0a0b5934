"""Write one checkpoint that every engine of a comparison loads: random weights of a given shape, as safetensors and as GGUF.

    python benchmarks/peers_checkpoint.py --shape 1b --out DIR [--gguf q8_0 q4_0 f16]

The weights are those of ``load_format="dummy"``, so Presage may run without the files while its peers (transformers, llama.cpp) read them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from presage.bundled import bundled_path
from presage.models.loading import Checkpoint, open_checkpoint, stderr_progress

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
}
SHARD_BYTES = 2 << 30
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config_of(shape: str, vocab: int) -> dict[str, Any]:
    """config.json of a Llama of this shape with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[shape],
        "head_dim": SHAPES[shape]["hidden_size"] // SHAPES[shape]["num_attention_heads"],
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_folder(shape: str, vocab: int, out: Path) -> Checkpoint:
    """A Hugging Face folder with the bundled tokenizer and sharded dummy weights; returns the open dummy checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config_of(shape, vocab), indent=1))
    source = bundled_path("presage-tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(str(source) + "/" + name, out / name)
    dummy = open_checkpoint(out, load_format="dummy")
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    with stderr_progress(f"writing {out}") as progress:
        for name, tensor in dummy.items(progress):
            shard[name] = tensor
            if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
                shard = flush(shard, out, weight_map)
        flush(shard, out, weight_map)
    index = {"metadata": {"total_size": dummy.nbytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return dummy


def flush(shard: dict[str, torch.Tensor], out: Path, weight_map: dict[str, str]) -> dict[str, torch.Tensor]:
    """Write one shard, note where its tensors went, and return an empty one."""
    file = f"model-part-{len(set(weight_map.values())) + 1:03}.safetensors"
    save_file(shard, out / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, file))
    return {}


def write_gguf(dummy: Checkpoint, out: Path, quant: str) -> Path:
    """The same weights for llama.cpp. Only what a speed run needs: its tokenizer is the bundled byte-level one."""
    import gguf

    config, path = dummy.config, out / f"model-{quant}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    add_vocabulary(writer, out, config["vocab_size"])
    kind = gguf.GGMLQuantizationType[quant.upper()]
    for name, tensor in dummy.items():
        data = interleaved(name, tensor.float().numpy(), config)
        if data.ndim == 1:
            writer.add_tensor(gguf_name(name), data)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: Any, folder: Path, vocab: int) -> None:
    """The bundled tokenizer, filled up with unused tokens to the model's vocabulary."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    unused = [f"<unused{i}>" for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + unused)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4) + [5] * len(unused))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def interleaved(name: str, data: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """llama.cpp rotates pairs (2i, 2i + 1) where Hugging Face rotates halves."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return data
    heads = config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]
    return np.ascontiguousarray(data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape))


def gguf_name(name: str) -> str:
    """A Llama tensor's name in GGUF."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def main() -> int:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", nargs="*", default=[], help="quantisations to write as well, such as q8_0 q4_0 f16")
    args = parser.parse_args()
    dummy = write_folder(args.shape, args.vocab, args.out)
    files = [str(write_gguf(dummy, args.out, quant)) for quant in args.gguf]
    print(json.dumps({"folder": str(args.out), "bytes": dummy.nbytes, "gguf": files}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
