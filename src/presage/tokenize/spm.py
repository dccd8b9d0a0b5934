"""SentencePiece files (``tokenizer.model``) that hold BPE: Llama 2, Mistral, Gemma.

The ``sentencepiece`` package reads the file; the tokenizer is built as for GGUF, which llama.cpp's goldens check. transformers' own
conversion guesses the treatment of leading spaces from the class name in tokenizer_config.json, so it is only the second choice.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from presage.tokenize.gguf_vocab import build

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def load_sentencepiece(file: Path, config: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer, or None if the package is absent or the file is of another kind (tiktoken, unigram).

    ``config`` is tokenizer_config.json: ``add_bos_token`` and ``add_eos_token`` are obeyed, BOS is added by default.
    """
    if not file.exists() or find_spec("sentencepiece") is None:
        return None
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(file))
    except (RuntimeError, OSError):
        return None
    ids = range(model.GetPieceSize())
    scores = [model.GetScore(i) for i in ids]
    # BPE numbers its merges 0, -1, -2, ...; unigram scores are log-probabilities.
    if any(s != int(s) for s in scores):
        return None
    meta: dict[str, Any] = {
        "ggml.model": "llama",
        "ggml.tokens": [model.IdToPiece(i) for i in ids],
        "ggml.scores": scores,
        "ggml.token_type": [_type(model, i) for i in ids],
        "ggml.add_space_prefix": model.EncodeAsPieces("a")[0] != "a",
        "ggml.add_bos_token": config.get("add_bos_token", True),
        "ggml.add_eos_token": config.get("add_eos_token", False),
    }
    named = {"bos": model.bos_id(), "eos": model.eos_id(), "unknown": model.unk_id()}
    meta.update({f"ggml.{name}_token_id": i for name, i in named.items() if i >= 0})
    return build(lambda key, default=None: meta.get(key, default), str(file))[0]


def _type(model: Any, i: int) -> int:
    if model.IsUnknown(i):
        return _UNKNOWN
    if model.IsControl(i):
        return _CONTROL
    return _BYTE if model.IsByte(i) else _NORMAL
