"""Tokenizers out of GGUF metadata meet llama.cpp's goldens."""

from __future__ import annotations

import base64
import json
from functools import cache

import pytest

from presage.core.errors import CheckpointError
from presage.tokenize import Tokenizer
from presage.tokenize.gguf_vocab import build
from presage.tokenize.pieces import _letters
from tests.shared import shared_data


@cache
def load(name: str) -> Tokenizer:
    """One of the two vocabularies; reading one takes the gguf package seconds."""
    return Tokenizer.load(shared_data(f"tokenizers/gguf_vocab/ggml-vocab-{name}.gguf"))


def goldens(name: str) -> list[tuple[str, list[int]]]:
    """(text, ids) pairs of llama.cpp's vocabulary tests."""
    base = shared_data(f"tokenizers/gguf_vocab/ggml-vocab-{name}.gguf.inp")
    texts = base.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = base.with_suffix(".out").read_text().split("\n")
    return [(t, [int(x) for x in line.split()]) for t, line in zip(texts, lines, strict=True)]


def mismatches(tokenizer: Tokenizer, name: str) -> list[str]:
    return [text for text, ids in goldens(name) if tokenizer.encode(text, add_special_tokens=False) != ids]


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_gguf_vocabularies_meet_the_goldens(name: str) -> None:
    tokenizer = load(name)
    assert mismatches(tokenizer, name) == []
    for text, ids in goldens(name):
        if "\ufffd" not in text:
            assert tokenizer.decode(ids) == text


def test_llama_spm_special_ids() -> None:
    tokenizer = load("llama-spm")
    assert tokenizer.encode("Hello") == [1, 15043]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 32000)
    assert {0, 1, 2} <= tokenizer.special_ids
    assert tokenizer.token_bytes(3 + 0xE6) == b"\xe6"
    assert tokenizer.token_text(15043) == " Hello"
    assert tokenizer.decode([15043]) == "Hello"


def bpe_from_ranks(vocab: dict[bytes, int]) -> list[str]:
    """Merges of a tiktoken vocabulary, which lists tokens by rank only."""
    table = _letters()
    merges = []
    for token in sorted((t for t in vocab if len(t) > 1), key=vocab.__getitem__):
        cuts = [(vocab[token[:i]], vocab[token[i:]], i) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        for _, _, i in sorted(cuts):
            merges.append(" ".join("".join(table[b] for b in part) for part in (token[:i], token[i:])))
    return merges


def test_llama3_pre_tokenizer_meets_the_goldens() -> None:
    lines = shared_data("tokenizers/llama3/tokenizer.model").read_text().split("\n")
    vocab = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    table = _letters()
    tokens = ["".join(table[b] for b in token) for token in sorted(vocab, key=vocab.__getitem__)]
    meta = {
        "ggml.model": "gpt2",
        "ggml.pre": "llama-bpe",
        "ggml.tokens": tokens,
        "ggml.merges": bpe_from_ranks(vocab),
        "ggml.add_bos_token": False,
    }
    backend, config = build(lambda key, default=None: meta.get(key, default), "test")
    assert mismatches(Tokenizer(backend, config, {}, None), "llama-bpe") == []


def test_qwen2_pre_tokenizer_meets_the_goldens() -> None:
    folder = shared_data("tokenizers/qwen2.5")
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [m for m in (folder / "merges.txt").read_text().split("\n") if m and not m.startswith("#version")]
    meta = {"ggml.model": "gpt2", "ggml.pre": "qwen2", "ggml.tokens": sorted(vocab, key=vocab.__getitem__), "ggml.merges": merges}
    backend, config = build(lambda key, default=None: meta.get(key, default), "test")
    assert mismatches(Tokenizer(backend, config, {}, None), "qwen2") == []


def test_errors() -> None:
    with pytest.raises(CheckpointError, match="pre-tokenizer 'martian' is unknown"):
        build(lambda key, default=None: {"ggml.model": "gpt2", "ggml.tokens": ["a"], "ggml.pre": "martian"}.get(key, default), "x.gguf")
    with pytest.raises(CheckpointError, match="tokenizer model 'bert' is not one of"):
        build(lambda key, default=None: {"ggml.model": "bert", "ggml.tokens": ["a"]}.get(key, default), "x.gguf")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        build(lambda key, default=None: default, "x.gguf")
