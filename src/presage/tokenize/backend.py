"""Find a checkpoint's tokenizer: tokenizer.json or GGUF metadata through ``tokenizers``, anything else through transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from presage.core.errors import CheckpointError

CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")


def load_backend(path: Path, reader: Any = None) -> tuple[Any, dict[str, Any]]:
    """The ``tokenizers.Tokenizer`` (or an adapter with its methods) of a folder or .gguf file, and its tokenizer_config as a dict.

    ``reader`` is an open GGUF file's, since opening one takes seconds for a large vocabulary.
    Raises CheckpointError if there is none or it cannot be read; the message names the file.
    """
    if path.suffix == ".gguf":
        from presage.tokenize.gguf_vocab import load_gguf_tokenizer

        return load_gguf_tokenizer(path, reader)
    config = _config(path)
    file = path / "tokenizer.json"
    if not file.exists():
        from presage.tokenize.spm import load_sentencepiece

        return load_sentencepiece(path / "tokenizer.model", config) or _through_transformers(path), config
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{file}: not a readable tokenizer ({error})") from error
    # A file may carry the padding and truncation of somebody's training run.
    backend.no_padding()
    backend.no_truncation()
    return backend, config


def _config(folder: Path) -> dict[str, Any]:
    # Imported here: the loading room pulls torch, a tokenizer alone must not.
    from presage.tokenize.files import read_object

    merged: dict[str, Any] = {}
    for name in CONFIG_FILES:
        if (folder / name).exists():
            merged.update(read_object(folder / name))
    return merged


def _through_transformers(folder: Path) -> Any:
    names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if not any(n.endswith((".model", ".tiktoken")) or n in ("vocab.json", "vocab.txt", "tokenizer_config.json") for n in names):
        raise CheckpointError(f"{folder}: no tokenizer found (tokenizer.json, tokenizer.model, vocab.json)")
    try:
        from transformers import AutoTokenizer

        wrapped = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and its converters raise anything, missing optional packages included
        reason = " ".join(str(error).split())[:300]
        if names & {"tokenizer.model"} and not (find_spec("sentencepiece") and find_spec("tiktoken")):
            reason = "tokenizer.model needs the packages sentencepiece or tiktoken, or a tokenizer.json beside it"
        raise CheckpointError(f"{folder}: transformers cannot load this tokenizer ({type(error).__name__}: {reason})") from error
    inner = getattr(wrapped, "backend_tokenizer", None)
    return inner if isinstance(inner, tokenizers.Tokenizer) else SlowBackend(wrapped)


class SlowBackend:
    """A transformers tokenizer written in Python behind the methods of ``tokenizers.Tokenizer`` that we use."""

    decoder = None

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def encode(self, text: str, add_special_tokens: bool = True) -> SlowEncoding:
        """Ids of a text."""
        return SlowEncoding(self._wrapped.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[SlowEncoding]:
        """Ids of several texts."""
        return [self.encode(t, add_special_tokens) for t in texts]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return str(self._wrapped.decode(ids, skip_special_tokens=skip_special_tokens))

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Token -> id."""
        return dict(self._wrapped.get_vocab())

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None if there is none."""
        return self.get_vocab().get(token)

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Id -> added token, with its ``special`` flag."""
        return dict(self._wrapped.added_tokens_decoder)


class SlowEncoding:
    """The ``ids`` of an encoding."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
