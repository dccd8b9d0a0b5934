"""A child process that compiles untrusted grammars first, under a memory limit, and is killed when it takes too long.

Run as a module it is that child: line 1 of its input is the tokenizer, every later line a spec; it answers each with a line.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from presage.core.errors import GrammarError

if TYPE_CHECKING:
    from presage.verify.grammar_spec import GrammarSpec

MEMORY = 2 << 30
IDLE_SECONDS = 60.0
WALK_STEPS = 96
MEAN_MASK_SECONDS = 0.02


class Taster:
    """The parent's end. One spec at a time; the child starts on the first one and ends itself when idle."""

    def __init__(self, tokenizer: str, timeout: float) -> None:
        self.tokenizer, self.timeout = tokenizer, timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def taste(self, spec: GrammarSpec) -> None:
        """Returns if the spec compiles within the limits. Errors: GrammarError with the reason."""
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            answer = self._ask({"kind": spec.kind, "text": spec.text, "any_whitespace": spec.any_whitespace})
        if answer is None:
            raise GrammarError(f"the grammar needs too much memory or more than {self.timeout:g} s to compile", param="structured_outputs")
        if answer:
            raise GrammarError(answer, param="structured_outputs")

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    def _start(self) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "presage.verify.grammar_taster"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
        self._send(self.tokenizer)
        # Importing the engine takes seconds that are not the grammar's fault.
        if self._read(self.timeout + 60) is None:
            self.close()
            raise GrammarError("the grammar compiler process did not start", param="structured_outputs")

    def _ask(self, question: dict[str, object]) -> str | None:
        self._send(json.dumps(question))
        line = self._read(self.timeout)
        if line is None:
            self.close()
            return None
        return str(json.loads(line)["error"])

    def _send(self, text: str) -> None:
        child = self._child
        try:
            if child is not None and child.stdin is not None:
                child.stdin.write(json.dumps(text).encode() + b"\n")
                child.stdin.flush()
        except BrokenPipeError:
            return  # the read that follows reports it

    def _read(self, seconds: float) -> bytes | None:
        child = self._child
        if child is None or child.stdout is None:
            return None
        ready, _, _ = select.select([child.stdout], [], [], seconds)
        return (child.stdout.readline() or None) if ready else None


def main() -> None:
    """The child: read, compile, walk, answer, until the input ends or nothing comes for a while."""
    import xgrammar as xg

    info = xg.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline()))
    engine = xg.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    _limit_memory()
    print(json.dumps("ready"), flush=True)
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        print(json.dumps({"error": _try(engine, json.loads(json.loads(line)), info.vocab_size)}), flush=True)


def _limit_memory() -> None:
    """Cap the address space at what is mapped now plus ``MEMORY`` (where the system tells what is mapped)."""
    mapped = Path("/proc/self/statm")
    if mapped.exists():
        limit = int(mapped.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _try(engine: object, question: dict[str, object], vocab_size: int) -> str:
    from presage.verify.grammar_compile import build
    from presage.verify.grammar_spec import GrammarSpec

    try:
        return _walk(build(engine, GrammarSpec(**question)), vocab_size)  # type: ignore[arg-type]
    except GrammarError as error:
        return error.message
    except MemoryError:
        return "the grammar needs too much memory to compile"


def _walk(made: object, vocab_size: int) -> str:
    """Follow one random text: an ambiguous grammar may compile at once and then take ever longer for each mask."""
    import numpy as np
    import xgrammar as xg

    matcher, rng, steps = xg.GrammarMatcher(made), random.Random(0), 0  # type: ignore[arg-type]
    row, began = np.zeros((1, (vocab_size + 31) // 32), np.int32), time.perf_counter()
    while steps < WALK_STEPS and not matcher.is_terminated():
        matcher.fill_next_token_bitmask(row, 0)
        allowed = np.flatnonzero(np.unpackbits(row[0].view(np.uint8), bitorder="little"))
        if not len(allowed) or not matcher.accept_token(int(allowed[rng.randrange(len(allowed))])):
            break
        steps += 1
    mean = (time.perf_counter() - began) / max(steps, 1)
    return f"the grammar is too slow: {mean * 1e3:.0f} ms a token" if mean > MEAN_MASK_SECONDS else ""


if __name__ == "__main__":
    main()
