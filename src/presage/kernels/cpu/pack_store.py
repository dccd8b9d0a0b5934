"""Packed weights on disk: a checkpoint that is quantised while it loads is quantised once.

A file holds the weights of one model in the order in which it was built: a weight's bytes one after the other, then an index (JSON), its
length (8 bytes) and a mark. The name says what it was made of: checkpoint, scheme, instruction set, and the sources of all code that
takes part; so a file is right or is not found. It is written beside its place and moved there when the model is complete.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch

from presage.kernels.cpu.cache import sources_of, sources_stamp
from presage.kernels.cpu.isa import current_isa
from presage.kernels.cpu.layout import layout
from presage.kernels.cpu.memory import Arena
from presage.kernels.cpu.pack import PackedLinear

MARK = b"PRSGPCK1"
SUFFIX = ".packed"
Index = list[dict[str, Any]]
_log = logging.getLogger("presage.load")


class PackStore:
    """The weights of one model, taken in order: from the file if it is there and whole, else made and written.

    ``arena``: where they are put. ``hits``: how many came from the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.arena, self.hits = path, Arena(), 0
        self._new = path.with_name(f"{path.name}.{os.getpid()}.new")
        self._file: BufferedReader | None = None
        self._out: BufferedWriter | None = None
        self._index: Index = []
        self._taken = 0
        self._open()

    @property
    def ready(self) -> bool:
        """Is there a file to read?"""
        return self._file is not None

    def take(self, shape: torch.Size, gated: bool, make: Callable[[], PackedLinear]) -> PackedLinear:
        """The next weight of the model, [n, k] = ``shape`` (twice if ``gated``)."""
        found = self._read(shape, gated)
        if found is None:
            found = self.arena.settle(make())
            self._write(found)
        self._taken += 1
        return found

    def finish(self) -> None:
        """The model is complete: put a file that was written in its place."""
        if self._out is not None:
            self._attempt(self._publish)
        elif self._file is not None:
            self._attempt(lambda: os.utime(self.path))  # used now: the last to be pruned
        self.close()

    def close(self) -> None:
        """Close files; one that is not finished is removed."""
        for file in (self._file, self._out):
            if file is not None:
                file.close()
        if self._out is not None:
            self._new.unlink(missing_ok=True)
        self._file = self._out = None

    def _open(self) -> None:
        try:
            self._file = self.path.open("rb")
            self._file.seek(-16, os.SEEK_END)
            length, mark = int.from_bytes(self._file.read(8), "little"), self._file.read(8)
            self._file.seek(-16 - length, os.SEEK_END)
            self._index = json.loads(self._file.read(length)) if mark == MARK else []
            self._file.seek(0)
        except (OSError, ValueError):
            self._index = []
        if not self._index:
            self.close()
            self._attempt(self._start)

    def _start(self) -> None:
        self._index = []
        self._new.parent.mkdir(parents=True, exist_ok=True)
        self._out = self._new.open("wb")

    def _read(self, shape: torch.Size, gated: bool) -> PackedLinear | None:
        if self._file is None:
            return None
        entry = self._index[self._taken] if self._taken < len(self._index) else {}
        if entry.get("shape") != [*shape, gated]:
            self._distrust()
            return None
        data = self.arena.take(entry["nbytes"])
        raw = data.numpy().data
        if self._file.readinto(raw) != len(raw) or zlib.crc32(raw) != entry["crc"]:
            self._distrust()
            return None
        self.hits += 1
        typed = data.view(getattr(torch, entry["dtype"])).view(entry["sizes"])
        return PackedLinear(typed, shape[0], shape[1], layout(entry["fmt"]), gated, entry["scales_at"])

    def _distrust(self) -> None:
        """The file is not what was written: use it no more. The next start writes it anew."""
        _log.warning("%s is damaged; quantising again", self.path)
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, packed: PackedLinear) -> None:
        if self._out is None:
            return
        raw = packed.data.reshape(-1).view(torch.uint8).numpy().data
        entry = {
            "shape": [packed.n, packed.k, packed.gated], "fmt": packed.fmt, "scales_at": packed.scales_at, "nbytes": raw.nbytes,
            "dtype": str(packed.data.dtype).removeprefix("torch."), "sizes": list(packed.data.shape), "crc": zlib.crc32(raw),
        }  # fmt: skip
        out = self._out
        if self._attempt(lambda: out.write(raw)):
            self._index.append(entry)

    def _publish(self) -> None:
        if self._out is not None:
            index = json.dumps(self._index).encode()
            self._out.write(index + len(index).to_bytes(8, "little") + MARK)
            self._out.close()
            os.replace(self._new, self.path)
            self._out = None

    def _attempt(self, action: Callable[[], Any]) -> bool:
        """A full or read-only disk costs the next start its time, nothing else."""
        try:
            action()
        except OSError as error:
            _log.warning("packed weights are not kept: %s", error)
            self.close()
            return False
        return True


@contextmanager
def pack_store(path: Path | None, keep_bytes: int) -> Iterator[PackStore | None]:
    """The store at ``path`` while a model is built; older files beside it are deleted until all take ``keep_bytes`` at most."""
    if path is None:
        yield None
        return
    store = PackStore(path)
    try:
        yield store
        store.finish()
        prune(path, keep_bytes)
    finally:
        store.close()


def code_stamp() -> str:
    """Names everything but the checkpoint that decides a file's bytes: the instruction set and the code that quantises and packs."""
    from presage.kernels.cpu import pack_int, pack_x12, quantise
    from presage.quantize import canonical, planned, rtn, schemes

    sources = {Path(str(m.__file__)) for m in (canonical, planned, rtn, schemes)}
    for module in (pack_int, pack_x12, quantise):
        sources |= sources_of(Path(str(module.__file__)))
    return f"{current_isa().numerics}-{sources_stamp(sources)}"


def prune(path: Path, keep_bytes: int) -> None:
    """Delete the files used longest ago beside ``path``, which stays."""
    try:
        files = sorted((f for f in path.parent.glob("*" + SUFFIX) if f != path), key=os.path.getmtime)
        total = sum(f.stat().st_size for f in (*files, path) if f.exists())
        for file in files:
            if total <= keep_bytes:
                break
            total -= file.stat().st_size
            file.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("old packed weights cannot be deleted: %s", error)
