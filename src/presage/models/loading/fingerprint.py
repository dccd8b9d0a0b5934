"""Which checkpoint is this? A name for its contents that costs no reading of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path


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
