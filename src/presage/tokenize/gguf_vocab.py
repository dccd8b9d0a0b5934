"""Tokenizers from GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece-style BPE (``llama``), built with ``tokenizers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from presage.core.errors import CheckpointError

META = "\u2581"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_TEMPLATE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _TEMPLATE.replace("DIGITS", "{1,3}"), _TEMPLATE.replace("DIGITS", "")
_PLAIN = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jina-en", "roberta-bpe"})
_THREE_DIGITS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "pixtral"})
_ONE_DIGIT = frozenset({"qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"})
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})


def load_gguf_tokenizer(path: Path, reader: Any = None) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the tokenizer_config a Hugging Face folder would have. Raises CheckpointError for kinds we cannot build."""
    # Imported here: a folder with tokenizer.json needs neither torch nor gguf.
    from presage.models.loading.gguf_file import open_gguf, read_meta

    reader = reader or open_gguf(path)
    return build(lambda key, default=None: read_meta(reader, f"tokenizer.{key}", default), str(path))


def build(meta: Any, where: str) -> tuple[Tokenizer, dict[str, Any]]:
    """From a function ``meta(key, default)`` over the ``tokenizer.`` metadata."""
    kind, tokens = meta("ggml.model"), meta("ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{where}: holds no tokenizer")
    types = meta("ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, meta("ggml.merges") or [], str(meta("ggml.pre", "default")), where)
    elif kind == "llama":
        tokenizer = _sentencepiece(tokens, meta("ggml.scores"), types, bool(meta("ggml.add_space_prefix", True)), where)
    else:
        raise CheckpointError(f"{where}: tokenizer model {kind!r} is not one of gpt2, llama")
    special = [AddedToken(t, special=True, normalized=False) for t, y in zip(tokens, types, strict=True) if y in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, y in zip(tokens, types, strict=True) if y == _USER_DEFINED])
    config = _config(meta, tokens)
    _add_ends(tokenizer, meta, config, default_bos=kind == "llama" or str(meta("ggml.pre", "")) in ("llama-bpe", "llama3"))
    return tokenizer, config


def _byte_level(tokens: list[str], merges: list[str], pre: str, where: str) -> Tokenizer:
    pairs = [(left, right) for left, right in (m.split(" ", 1) for m in merges)]
    vocab = {t: i for i, t in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, without replaying its merges.
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in _THREE_DIGITS))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, where)
    if pre in _ONE_DIGIT:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str, where: str) -> Any:
    if pre in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = _LLAMA3 if pre in _THREE_DIGITS else _QWEN2 if pre in _ONE_DIGIT else None
    if pattern is None:
        raise CheckpointError(f"{where}: pre-tokenizer {pre!r} is unknown; pass --tokenizer with the model's own tokenizer")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])


def _sentencepiece(tokens: list[str], scores: list[float] | None, types: list[int], prefix: bool, where: str) -> Tokenizer:
    if scores is None:
        raise CheckpointError(f"{where}: a llama tokenizer without scores")
    vocab = {t: i for i, t in enumerate(tokens)}
    unknown = next((t for t, y in zip(tokens, types, strict=True) if y == _UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocab, _merges(tokens, scores, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", META)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(META), spaces]) if prefix else spaces
    steps = [decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def _merges(tokens: list[str], scores: list[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours give the piece with the best score; BPE wants that order spelled out pair by pair."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _config(meta: Any, tokens: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, key in names.items():
        token_id = meta(f"ggml.{key}_token_id")
        if token_id is not None and 0 <= int(token_id) < len(tokens):
            out[name] = tokens[int(token_id)]
    if meta("chat_template"):
        out["chat_template"] = meta("chat_template")
    ends = [meta(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    out["eos_token_id"] = [int(e) for e in ends if e is not None]
    return out


def _add_ends(tokenizer: Tokenizer, meta: Any, config: dict[str, Any], default_bos: bool) -> None:
    bos = config.get("bos_token") if meta("ggml.add_bos_token", default_bos) else None
    eos = config.get("eos_token") if meta("ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    shape = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    ends = [(t, tokenizer.token_to_id(t)) for t in dict.fromkeys((bos, eos)) if t]
    tokenizer.post_processor = processors.TemplateProcessing(single=shape, pair=[*shape, "$B"], special_tokens=ends)
