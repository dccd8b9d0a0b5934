"""The grammar room, made when the first request needs it: importing the grammar engine costs more than a small model's start.

Stands in the loop as the masker (a companion plus ``prune``, ``late``, ``terminated``) and does nothing until a grammar was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from presage.core.errors import GrammarError, PresageError
from presage.core.events import Waited
from presage.core.plan import Draft, Grants, NewIds, StepPlan
from presage.core.request import Request
from presage.core.types import Wait

Factory = Callable[[], tuple[Any, Any]]


class Grammars:
    """``factory`` returns (compiler, masker); it runs once, in a worker thread."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-load")
        self._compiler: Any = None
        self._masker: Any = None

    # ---- compiling, from any thread

    def submit(self, request_id: str, params: Any, post: Callable[[Waited], None]) -> None:
        """Compile in the background; ``post`` gets one Waited event."""

        def done(error: PresageError | None) -> None:
            post(Waited(request_id, Wait.GRAMMAR, (error.code, error.message, error.status) if error else None))

        if self._compiler is not None:
            self._compiler.submit(request_id, params, done)
        else:
            self._pool.submit(self._first, request_id, params, done)

    def _first(self, request_id: str, params: Any, done: Callable[[PresageError | None], None]) -> None:
        try:
            self.load().submit(request_id, params, done)
        except Exception as error:  # reported to the request, whatever it is: a missing package, a broken vocabulary
            done(error if isinstance(error, PresageError) else GrammarError(f"the grammar engine cannot be used: {error}"))

    def load(self) -> Any:
        """The compiler, made now if it is not there."""
        if self._compiler is None:
            compiler, self._masker = self._factory()
            self._compiler = compiler
        return self._compiler

    def cancel(self, request_id: str) -> None:
        """The request ended while its grammar compiled."""
        if self._compiler is not None:
            self._compiler.cancel(request_id)

    def close(self) -> None:
        """End the worker threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()

    # ---- the loop's companion

    def open(self, slot: int, req: Request) -> None:
        """Start the matcher of a constrained request; others cost nothing."""
        if req.sampling.structured_outputs is not None:
            self.load()
            self._masker.open(slot, req)

    def advance(self, new: NewIds) -> None:
        """Committed ids of one step."""
        if self._masker is not None and self._masker.tracks:
            self._masker.advance(new)

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``."""
        if self._constrained(slot):
            self._masker.rewind(slot, known)

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` starts as a copy of ``src``."""
        if self._constrained(src):
            self._masker.fork(src, dst, req)

    def save(self, slot: int) -> bytes | None:
        """Rebuilt by the receiver."""
        return None

    def load_state(self, slot: int, blob: bytes) -> None:
        """Nothing was saved."""

    def close_slot(self, slot: int) -> None:
        """The request left the slot."""
        if self._constrained(slot):
            self._masker.close(slot)

    def _constrained(self, slot: int) -> bool:
        return self._masker is not None and slot in self._masker.tracks

    # ---- what the loop asks

    def prune(self, draft: Draft, grants: Grants) -> Draft:
        """The draft without nodes the grammars refuse."""
        return self._masker.prune(draft, grants) if self._masker is not None else draft

    def late(self, plan: StepPlan) -> Any:
        """The step's masks, to be filled while the model runs; None if no span is constrained."""
        return self._masker.late(plan) if self._masker is not None else None

    def constrained(self) -> Mapping[int, Any]:
        """Slots that have a grammar."""
        return self._masker.tracks if self._masker is not None else {}

    def forced(self, slot: int) -> str:
        """Text that must come next in a slot."""
        return str(self._masker.forced(slot)) if self._masker is not None else ""

    def terminated(self, slot: int) -> bool:
        """Nothing may follow what the request has."""
        return self._constrained(slot) and bool(self._masker.terminated(slot))


class MaskerSlots:
    """The companion face of ``Grammars`` (whose ``close`` and ``load`` mean the whole room)."""

    def __init__(self, room: Grammars) -> None:
        self.room = room
        self.open, self.advance, self.rewind, self.fork, self.save = room.open, room.advance, room.rewind, room.fork, room.save
        self.load, self.close = room.load_state, room.close_slot
        self.prune, self.late, self.terminated, self.cancel = room.prune, room.late, room.terminated, room.cancel


def grammars(tokenizer: Any, vocab_size: int, eos: list[int], timeout: float) -> Grammars:
    """The room for one tokenizer."""

    def make() -> tuple[Any, Any]:
        from presage.verify.grammar_compile import GrammarCompiler
        from presage.verify.grammar_masks import Masker

        compiler = GrammarCompiler(tokenizer, vocab_size, eos, timeout=timeout)
        return compiler, Masker(compiler)

    return Grammars(make)
