"""Text to token files, with a manifest of what went in, and batches that are a function of (seed, step).

A folder holds ``tokens.u16`` (training), ``validation.u16`` (every hundredth document), ``tokenizer.json`` and ``manifest.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from presage.core.errors import ConfigError
from presage.train.recipe import Recipe
from presage.train.sources import Document, documents
from presage.train.tokenizer import END, train_tokenizer

HELD_OUT = 100
_CHUNK = 256


@dataclass(frozen=True)
class Corpus:
    """Token ids (uint16 [n], mapped) and the manifest's sha256."""

    train: np.ndarray
    validation: np.ndarray
    manifest: str

    def batch(self, seed: int, step: int, rows: int, length: int) -> np.ndarray:
        """int64 [rows, length + 1]: the ids of one step, from the step's number alone, so that a resumed run sees what it would have."""
        draw = np.random.Generator(np.random.Philox(key=seed, counter=step))
        starts = draw.integers(0, len(self.train) - length, rows)
        return np.stack([self.train[s : s + length + 1] for s in starts]).astype(np.int64)

    def windows(self, count: int, length: int) -> np.ndarray:
        """int64 [n <= count, length + 1]: the first windows of the validation text."""
        n = min(count, (len(self.validation) - 1) // length)
        return np.stack([self.validation[i * length : (i + 1) * length + 1] for i in range(n)]).astype(np.int64)


def prepare(recipe: Recipe, data: Path, out: Path, tokenizer: Path | None = None) -> Corpus:
    """Build the token files in ``out`` unless they are there for the same recipe; ``tokenizer`` reuses another model's (a draft's)."""
    stamp = out / "corpus.json"
    key = hashlib.sha256(f"{recipe.digest()} {tokenizer and _sha256(tokenizer)}".encode()).hexdigest()
    if not stamp.exists() or json.loads(stamp.read_text())["key"] != key:
        out.mkdir(parents=True, exist_ok=True)
        _build(recipe, data, out, tokenizer)
        stamp.write_text(json.dumps({"key": key, "manifest": _sha256(out / "manifest.jsonl")}))
    corpus = open_corpus(out)
    if len(corpus.train) <= recipe.length + 1 or len(corpus.validation) <= recipe.length:
        raise ConfigError(f"too little text: {len(corpus.train)} training and {len(corpus.validation)} validation tokens", param="data")
    return corpus


def open_corpus(out: Path) -> Corpus:
    """The token files of an earlier ``prepare``. Raises ConfigError if the manifest was changed since."""
    manifest = _sha256(out / "manifest.jsonl")
    if manifest != json.loads((out / "corpus.json").read_text())["manifest"]:
        raise ConfigError(f"{out}/manifest.jsonl was changed after the token files were made", param="data")
    return Corpus(_map(out / "tokens.u16"), _map(out / "validation.u16"), manifest)


def _map(file: Path) -> np.ndarray:
    return np.memmap(file, np.uint16, "r") if file.stat().st_size else np.empty(0, np.uint16)


def _build(recipe: Recipe, data: Path, out: Path, given: Path | None) -> None:
    if given is not None:
        tokenizer = Tokenizer.from_file(str(given))
    else:
        tokenizer = train_tokenizer(_sample(recipe, data), recipe.shape.vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    counts: dict[tuple[str, str, Path], list[int]] = {}
    with (out / "tokens.u16").open("wb") as train, (out / "validation.u16").open("wb") as held:
        for n, (doc, ids) in enumerate(_encoded(tokenizer, documents(recipe, data))):
            is_held = _held_out(doc.text)
            (held if is_held else train).write(np.array([*ids, END], np.uint16).tobytes())
            entry = counts.setdefault((doc.source, doc.name, doc.file), [n, 0, 0, 0])
            entry[1] += 1
            entry[2 + is_held] += len(ids) + 1
    _write_manifest(out / "manifest.jsonl", tokenizer, counts)


def _held_out(text: str) -> bool:
    # By content: copies of a conversation stay on one side.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % HELD_OUT == 0


def _sample(recipe: Recipe, data: Path) -> Iterator[str]:
    """Every k-th document up to about ``tokenizer_sample_bytes``, spread over all sources."""
    total = sum(len(d.text) for d in documents(recipe, data))
    every = max(1, total // recipe.tokenizer_sample_bytes)
    for n, doc in enumerate(documents(recipe, data)):
        if n % every == 0:
            yield doc.text


def _encoded(tokenizer: Tokenizer, docs: Iterator[Document]) -> Iterator[tuple[Document, list[int]]]:
    chunk: list[Document] = []
    for doc in docs:
        chunk.append(doc)
        if len(chunk) == _CHUNK:
            yield from zip(chunk, (e.ids for e in tokenizer.encode_batch([d.text for d in chunk])), strict=True)
            chunk = []
    yield from zip(chunk, (e.ids for e in tokenizer.encode_batch([d.text for d in chunk])), strict=True)


def _write_manifest(path: Path, tokenizer: Tokenizer, counts: dict[tuple[str, str, Path], list[int]]) -> None:
    """One line per input file in the order of training text; names are relative, so that two machines can compare."""
    lines = [{"source": "tokenizer", "sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}]
    for (source, name, file), (first, docs, train, held) in counts.items():
        row = {"source": source, "file": name, "sha256": _sha256(file), "first_document": first, "documents": docs}
        lines.append({**row, "train_tokens": train, "validation_tokens": held})  # type: ignore[dict-item]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
