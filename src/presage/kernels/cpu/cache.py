"""How kernels are compiled and kept on disk.

A *kernel* is a C callback `void kernel(int64 table)` made by a factory whose arguments (ints and strings) become captured
constants:

    @kernel
    def scale(columns: int):                       # one compiled callback per `columns`
        def run(table):                            # `table`: address of a Table, see team.py and region.py
            ...
        return run

    team.run(scale(64), table.address)             # compiled or loaded at the first use of .address

Helper functions called by kernels are marked `@device`: they are inlined, so register files may be passed to them.

numba's own cache has three traps (measured): it does not see edits in the module that defines the intrinsics, a closure
over an intrinsic or a helper never hits, and every miss leaves a file behind. Here the key is explicit instead: factory name,
constants, a stamp over the factory's source file and everything of ours that it imports, and one over numba, llvmlite, LLVM and
the target CPU. One directory per toolchain, one file per kernel, written atomically; a damaged file is recompiled.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import itertools
import os
import pickle
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core import compiler, registry, serialize, types
from numba.core import config as numba_config
from numba.core.bytecode import FunctionIdentity
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys

Progress = Callable[[int, int, str], None]
config: Any = numba_config  # its attributes are set at run time

KEEP = 4
"""Versions of a kernel's code that stay on disk: branches and checkouts share the directory."""

# Helpers are called from kernels only: no wrappers for Python (a quarter of the compile time), and none of numba's runtime.
_LEAN: dict[str, Any] = {"error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def device(function: Callable[..., Any]) -> Any:
    """A helper inlined into the kernels that call it; not callable from Python. Never raises: a division by zero gives inf or NaN."""
    return numba.njit(**_LEAN, forceinline=True)(function)


def subroutine(function: Callable[..., Any]) -> Any:
    """A helper that stays a call (large and rarely executed code): arguments and results are scalars and vectors."""
    # Said explicitly: numba hands `forceinline` down from a @device caller.
    return numba.njit(**_LEAN, forceinline=False)(function)


IMPORTED = time.time()
"""When this process began to import kernels."""


def cache_directory(of: str = "kernels") -> Path:
    """The folder for one kind of file under NUMBA_CACHE_DIR, else PRESAGE_CACHE_ROOT, else ~/.cache/presage."""
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("PRESAGE_CACHE_ROOT")
    return (Path(root) if root else Path.home() / ".cache" / "presage") / of


def sources_of(path: Path) -> frozenset[Path]:
    """The source file `path` and all modules of `presage` it imports, directly or not: what its machine code may depend on."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += _imports(source)
    return frozenset(found)


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return tuple(source for name in sorted(names) if name.startswith("presage.kernels") and (source := _source(name)))


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # `from module import name` of something that is no module
        return None
    return Path(spec.origin) if spec and spec.origin else None


def sources_stamp(paths: Iterable[Path]) -> str:
    """Hash over the contents of source files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def toolchain_stamp() -> str:
    """Hash over Python, numba, llvmlite, LLVM and the CPU compiled for."""
    versions = (sys.version_info[:2], numba.__version__, llvmlite.__version__, binding.llvm_version_info, binding.get_process_triple())
    target = (config.CPU_NAME or binding.get_host_cpu_name(), config.CPU_FEATURES, binding.get_host_cpu_features().flatten(), config.OPT)
    return hashlib.sha256(repr((versions, target)).encode()).hexdigest()[:16]


@cache
def _stamps(path: Path) -> tuple[str, str]:
    return toolchain_stamp(), sources_stamp(sources_of(path))


@cache
def edited_since_import(path: Path) -> bool:
    """Was a source of this kernel written after the process began to import? Then what runs here may not be what the file says."""
    return any(source.stat().st_mtime > IMPORTED for source in sources_of(path))


class Kernel:
    """One compiled C callback `void (int64 table)`; compiled, or loaded from disk, when `address` is first read."""

    def __init__(self, factory: Callable[..., Callable[..., None]], constants: tuple[int | str, ...]) -> None:
        self._factory, self._constants = factory, constants
        self._compiled: Any = None
        self._address = 0
        self.from_cache = False
        self.name = "-".join([factory.__name__, *map(str, constants)])

    @property
    def address(self) -> int:
        """Address of the callback."""
        return self._address or self.load()

    def load(self) -> int:
        """Make the callback ready and return its address. Safe to call from several threads."""
        with global_compiler_lock:
            if not self._address:
                self._compiled = self._read() or self._compile()
                self._address = self._compiled.library.get_pointer_to_function(self._compiled.fndesc.llvm_cfunc_wrapper_name)
        return self._address

    def _path(self) -> Path:
        toolchain, sources = _stamps(Path(inspect.getsourcefile(self._factory) or __file__))
        return cache_directory() / toolchain / f"{self._factory.__module__}.{self.name}-{sources}.bin"

    def _edited(self) -> bool:
        return edited_since_import(Path(inspect.getsourcefile(self._factory) or __file__))

    def _read(self) -> Any:
        if self._edited():
            return None
        # A kernel from disk may be the first compiled thing in the process: without numba's runtime its calls of memset stay
        # unresolved, and LLVM then leaves every later address of the module zero.
        rtsys.initialize(registry.cpu_target.target_context)
        try:
            payload = pickle.loads(self._path().read_bytes())
            compiled = compiler.CompileResult._rebuild(registry.cpu_target.target_context, *payload)
        except Exception:  # a missing, truncated or foreign file of any kind means the same: compile again
            return None
        self.from_cache = True
        return compiled

    def _compile(self) -> Any:
        # Without numba's runtime (no allocation), whose symbols a process that only loads kernels would not have.
        options = {"nopython": True, "error_model": "numpy", "_nrt": False}
        # numba numbers functions from 1 in every process and the numbers go into symbols. Two kernels from disk, compiled by different
        # processes, would then share names, and the linker would silently give one kernel the subroutines of the other.
        FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))
        callback: Any = CFunc(self._factory(*self._constants), ((types.int64,), types.void), {}, options)
        compiled = callback._compile_uncached()
        compiled.library.enable_object_caching()
        compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
        self._write(serialize.dumps(compiled._reduce()))
        return compiled

    def _write(self, payload: bytes) -> None:
        if self._edited():
            return  # the stamp would name the new text, the code is of the old one
        path = self._path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
            os.replace(name, path)
            versions = path.parent.glob(path.name.rpartition("-")[0] + "-" + "?" * 16 + ".bin")
            for old in sorted(versions, key=os.path.getmtime)[:-KEEP]:
                old.unlink()
        except OSError:  # a read-only or full disk costs a recompilation at the next start, nothing else
            return

    def __repr__(self) -> str:
        return f"<Kernel {self.name}>"


def kernel(factory: Callable[..., Callable[..., None]]) -> Callable[..., Kernel]:
    """Turn a factory of kernel functions into a function from the same constants to the one `Kernel` made of them."""

    @cache
    def of(*constants: int | str) -> Kernel:
        return Kernel(factory, constants)

    of.__doc__, of.__name__ = factory.__doc__, factory.__name__
    return of


def compile_all(kernels: Iterable[Kernel], progress: Progress | None = None) -> int:
    """Make every kernel ready; `progress(done, total, name)` is called before each and once at the end. Returns how many were compiled."""
    wanted = list(kernels)
    for done, item in enumerate(wanted):
        if progress:
            progress(done, len(wanted), item.name)
        item.load()
    if progress:
        progress(len(wanted), len(wanted), "")
    return sum(not item.from_cache for item in wanted)
