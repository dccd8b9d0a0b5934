"""Remembered responses on disk (one file, checked by a digest and a fingerprint) and from a JSONL of past outputs.

A file holds ids only: counts are rebuilt by inserting them, which takes less time than reading the trees would.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from presage.core.errors import CheckpointError, ConfigError
from presage.core.salt import salt_of
from presage.core.types import Ints
from presage.draft.suffix_library import Key

MAGIC = b"PRESAGE-SUFFIX-1"
_DIGEST = 32
_TEXT = ("output", "response", "completion", "text")


def write(path: Path, sequences: list[tuple[Key, Ints]], fingerprint: str) -> None:
    """Replace ``path``, at once and whole, by a file of these responses. ``fingerprint`` names what the ids mean (model and tokenizer); what
    stands before its last "@" is for people and not compared. Raises CheckpointError if it cannot be written; the old file stays then."""
    keys = sorted({key for key, _ in sequences})
    place = {key: i for i, key in enumerate(keys)}
    header = json.dumps({"fingerprint": fingerprint, "keys": keys, "sequences": len(sequences)}).encode()
    columns = np.array([[place[key], len(ids)] for key, ids in sequences], "<i4").reshape(-1, 2)
    parts = (MAGIC, len(header).to_bytes(4, "little"), header, columns.tobytes(), *(ids.astype("<i4").tobytes() for _, ids in sequences))
    digest, temporary = hashlib.sha256(), _temporary(path)
    try:
        with temporary.open("wb") as f:
            for part in parts:
                digest.update(part)
                f.write(part)
            f.write(digest.digest())
            f.flush()
            os.fsync(f.fileno())  # the new name must not reach the disk before what it names
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, param: str) -> None:
    """Raise ConfigError about ``param`` if ``write`` could not make this file: better now than when an engine closes."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        _temporary(path).touch()
        _temporary(path).unlink()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param=param) from error


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + f".{os.getpid()}.tmp")


def read(path: Path, fingerprint: str) -> list[tuple[Key, Ints]]:
    """What ``write`` stored. Raises CheckpointError if the file cannot be read, is damaged, or is about another model."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    body = blob[:-_DIGEST]
    if not blob.startswith(MAGIC) or hashlib.sha256(body).digest() != blob[-_DIGEST:]:
        raise CheckpointError(f"{path} is not a suffix file of this version, or it is damaged")
    size = int.from_bytes(body[len(MAGIC) : len(MAGIC) + 4], "little")
    at = len(MAGIC) + 4
    header = json.loads(body[at : at + size])
    if header["fingerprint"].rpartition("@")[2] != fingerprint.rpartition("@")[2]:
        raise CheckpointError(f"{path} holds ids of {header['fingerprint']!r}, not of {fingerprint!r}")
    numbers = np.frombuffer(body, "<i4", offset=at + size)
    columns, ids = numbers[: 2 * header["sequences"]].reshape(-1, 2), numbers[2 * header["sequences"] :].astype(np.int32)
    keys: list[Key] = [(k[0], k[1], k[2], k[3]) for k in header["keys"]]
    ends = np.cumsum(columns[:, 1]).tolist()
    return [(keys[k], ids[end - n : end].copy()) for (k, n), end in zip(columns.tolist(), ends, strict=True)]


def past_outputs(path: Path, encode: Callable[[str], list[int]] | None = None) -> Iterator[tuple[Key, Ints]]:
    """Responses of a JSONL: ``token_ids``, or ``output``, ``response``, ``completion`` or ``text`` to be encoded; optional ``model``,
    ``adapter``, ``tenant``, ``cache_salt``: only requests with the same are drafted from it.

    Raises ConfigError, naming the line, for rows without one, and CheckpointError for an unreadable file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                ids = _ids_of(row, encode)
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigError(f"{path}, line {number}: {error}", param="suffix_decoding_warm_up") from error
            model, adapter, tenant = (str(row.get(name) or "") for name in ("model", "adapter", "tenant"))
            yield (model, adapter, tenant, salt_of(tenant, row.get("cache_salt")).hex()), ids


def _ids_of(row: Any, encode: Callable[[str], list[int]] | None) -> Ints:
    if not isinstance(row, dict):
        raise TypeError("a row must be an object")
    if "token_ids" in row:
        ids = np.array(row["token_ids"], np.int32)
        if ids.ndim != 1 or (len(ids) and ids.min() < 0):
            raise ValueError("token_ids must be a list of ids")
        return ids
    text = next((row[name] for name in _TEXT if isinstance(row.get(name), str)), None)
    if text is None:
        raise ValueError(f"needs token_ids or one of {', '.join(_TEXT)}")
    if encode is None:
        raise ValueError("text needs a tokenizer")
    return np.array(encode(text), np.int32)
