"""Which checkpoint is this? Names for its contents that cost no reading of all weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLE = 1 << 16
WEIGHTS = (".safetensors", ".gguf", ".bin")


def fingerprint(path: Path) -> str:
    """Hash over the files of a checkpoint folder, or one file: names, sizes, times of change, and small JSON files in full."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in files:
        if file.is_file():
            facts = file.stat()
            digest.update(f"{file.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
            if file.suffix == ".json" and facts.st_size < 1 << 20:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


def identity(path: Path) -> str:
    """The same for every copy of a checkpoint, wherever it lies: hash over config.json and a beginning, middle and end of each weight file."""
    files = sorted(f for f in path.iterdir() if f.is_file() and (f.suffix in WEIGHTS or f.name == "config.json")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.suffix}\0{size}\0".encode())
        with file.open("rb") as f:
            for at in (0, size // 2, size - SAMPLE):
                f.seek(max(0, at))
                digest.update(f.read(SAMPLE))
    return digest.hexdigest()[:24]
