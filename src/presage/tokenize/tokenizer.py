"""``Tokenizer``: one face for tokenizer.json, GGUF vocabularies and the tokenizers that only transformers can read."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from presage.tokenize.backend import load_backend
from presage.tokenize.chat import ChatTemplate, find_template, special_strings
from presage.tokenize.files import read_object
from presage.tokenize.pieces import ByteTable, byte_table

if TYPE_CHECKING:
    from presage.models.loading.checkpoint import Checkpoint

_BOS_BY_FLAG = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class Tokenizer:
    """Encodes and decodes text.

    ``vocab_size`` is the highest id + 1 (the logits may be wider), ``eos_ids`` all ids that end generation, ``bos_id`` may be None,
    ``special_ids`` what ``skip_special_tokens`` drops, ``chat_template`` may be None. Instances are immutable and may be shared by threads.
    """

    def __init__(self, backend: Any, config: dict[str, Any], model: dict[str, Any], template: ChatTemplate | None) -> None:
        self._backend, self.config = backend, config
        self.special_tokens = special_strings(config)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.chat_template = template
        self.bos_id = self._one_id("bos_token", model.get("bos_token_id"))
        self.pad_id = self._one_id("pad_token", model.get("pad_token_id"))
        self.eos_ids = self._eos(model)
        self._bos_flag = self._wants_bos()

    @classmethod
    def load(cls, source: str | Path | Checkpoint, revision: str | None = None, chat_template: str | None = None) -> Tokenizer:
        """From a name, folder, .gguf file or open checkpoint; ``chat_template`` is a Jinja file that replaces the tokenizer's own.

        Raises CheckpointError (no or broken tokenizer) and ConfigError (chat template file).
        """
        opened = _opened(source)
        path = opened[0] if opened else _resolve(source, revision)
        backend, config = load_backend(path, getattr(source, "reader", None))
        model = opened[1] if opened else _model_facts(path, config)
        template = ChatTemplate.from_file(chat_template, special_strings(config)) if chat_template else find_template(path, config)
        return cls(backend, config, model, template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; ``add_special_tokens`` adds BOS and the like; a rendered chat has its own: pass False."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._with_bos(ids) if add_special_tokens else ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of several texts, on all cores where the tokenizer can."""
        found = [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)]
        return [self._with_bos(ids) for ids in found] if add_special_tokens else found

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; broken UTF-8 becomes U+FFFD, unknown ids nothing. Equals what ``Detokenizer`` yields piece by piece."""
        kept = [int(i) for i in ids]
        if self.table is None:
            return str(self._backend.decode(kept, skip_special_tokens=skip_special_tokens))
        text = codecs.utf_8_decode(self.join(kept, skip_special_tokens), "replace", True)[0]
        return text[1:] if self.table.strip and text.startswith(" ") else text

    def join(self, ids: Sequence[int], skip_special_tokens: bool) -> bytes:
        """Bytes of ``ids`` one after another."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        pieces, size = self._pieces, self.vocab_size
        return b"".join([pieces[i] for i in ids if 0 <= i < size and i not in skip])

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one id (``bytes`` of a log-probability entry); empty for ids without a token."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """One id as text by itself, leading space kept; bytes that are only part of a character show as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None for ids without one."""
        return self.tokens[token_id] if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's spelling, None if there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    @property
    def backend(self) -> Any:
        """The ``tokenizers.Tokenizer`` underneath (grammar engines want it)."""
        return self._backend

    @cached_property
    def tokens(self) -> list[str | None]:
        """The vocabulary by id; None where an id has no token."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        out: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            out[i] = token
        return out

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return len(self.tokens)

    @cached_property
    def table(self) -> ByteTable | None:
        """Bytes by id if decoding is concatenation, else None (see ``pieces``)."""
        return byte_table(self._backend.decoder, self.tokens)

    @cached_property
    def _pieces(self) -> Sequence[bytes]:
        return self.table.pieces if self.table is not None else [(t or "").encode() for t in self.tokens]

    def _one_id(self, name: str, fallback: Any) -> int | None:
        token = self.special_tokens.get(name)
        found = self.token_to_id(token) if token is not None else None
        if found is not None:
            return found
        return int(fallback) if isinstance(fallback, int) else None

    def _eos(self, model: dict[str, Any]) -> tuple[int, ...]:
        named = self._one_id("eos_token", None)
        ids = set(model.get("eos_token_ids", ())) | ({named} if named is not None else set())
        return tuple(sorted(ids))

    def _wants_bos(self) -> bool | None:
        # Llama-like classes obey add_bos_token in tokenizer_config.json whatever the post-processor in tokenizer.json does.
        kind = str(self.config.get("tokenizer_class", "")).removesuffix("Fast")
        flag = self.config.get("add_bos_token")
        return flag if kind in _BOS_BY_FLAG and isinstance(flag, bool) and self.bos_id is not None else None

    def _with_bos(self, ids: list[int]) -> list[int]:
        first = ids[0] if ids else None
        if self._bos_flag is True and first != self.bos_id and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids


def _resolve(source: Any, revision: str | None) -> Path:
    from presage.models.loading.locate import resolve

    return resolve(source, revision, weights=False, need_config=False)


def _opened(source: Any) -> tuple[Path, dict[str, Any]] | None:
    if isinstance(source, (str, Path)):
        return None
    return source.path, _facts(source.config, source.generation_config)


def _model_facts(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    if path.is_dir():
        return _facts(read_object(path / "config.json"), read_object(path / "generation_config.json"))
    return _facts(config, {})


def _facts(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """bos, pad and the union of all EOS ids: generation_config.json names more of them (``<|eot_id|>``) than config.json."""
    merged = {**config, **{k: v for k, v in generation.items() if v is not None}}
    eos: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        eos.update([value] if isinstance(value, int) else value or ())
    return {"bos_token_id": merged.get("bos_token_id"), "pad_token_id": merged.get("pad_token_id"), "eos_token_ids": sorted(eos)}
