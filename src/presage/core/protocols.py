"""The protocols of the rooms. Scheduler, LengthController, Drafter, AcceptanceRule, Router, Workload and Program are promised to outsiders."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from presage.core.events import Boundary, ChildDone, Command, Event, Started
from presage.core.kv import KVGeometry
from presage.core.plan import Budget, Draft, Facts, Grants, Keep, Moves, NewIds, StepDone, StepPlan, Verdict
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Floats, Ints, Longs


class Companion(Protocol):
    """Per-request state outside the table, by slot. Preemption calls nothing; ``length(slot)`` always equals ``known``.

    One that keeps nothing of the ids may derive from this: ids then pass it by, a fork opens the branch's own request, and nothing is saved.
    """

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot; its known ids are ``req.prompt`` + ``req.emitted``."""
        return

    def advance(self, new: NewIds) -> None:
        """Committed ids of one step."""
        return

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``."""
        return

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` starts as a copy of ``src``."""
        self.open(dst, req)

    def save(self, slot: int) -> bytes | None:
        """State for migration; None = the receiver rebuilds by open + advance."""
        return None

    def load(self, slot: int, blob: bytes) -> None:
        """Restore what ``save`` gave."""
        return

    def close(self, slot: int) -> None:
        """The request left the slot."""
        return


class Ledger(Protocol):
    """Prices blocks while a plan is made; no effect on the cache. Vectors are int64 [POOLS] (one pool per KV group)."""

    free: Longs

    def need(self, slots: Ints, upto: Ints) -> Longs:
        """Blocks [n, POOLS] that must be taken so that each slot can hold ``upto`` tokens (queued slots: above their prefix hit)."""

    def whole(self, slot: int, upto: int) -> Longs:
        """Most blocks [POOLS] the slot will hold at once while it grows to ``upto`` tokens in chunks (window groups stay bounded)."""

    def take(self, blocks: Longs) -> bool:
        """Subtract [POOLS] from ``free`` if it fits; False and no effect otherwise."""

    def give(self, slot: int) -> None:
        """Add what evicting the slot really frees (blocks with one reference)."""


class KVCache(Protocol):
    """The pure half of the KV cache: who owns which block. Called by the loop only.

    ``lengths[slot]``: committed tokens really held; read it after apply, truncate and fork, which may leave less than was asked for.
    """

    geometry: KVGeometry
    tables: tuple[np.ndarray, ...]
    lengths: Ints
    version: int

    def open(self, slot: int, req: Request) -> None: ...
    def match(self, slot: int, ids: np.ndarray) -> int: ...
    def grown(self, slots: Ints) -> list[int]: ...
    def ledger(self) -> Ledger: ...
    def apply(self, slots: Ints, upto: Ints) -> Moves: ...
    def commit(self, slots: Ints, computed: Ints, ids: Callable[[int, int, int], np.ndarray]) -> None: ...
    def truncate(self, slot: int, n: int) -> None: ...
    def drop(self, slot: int) -> None: ...
    def fork(self, src: int, dst: int, n: int) -> None: ...
    def close(self, slot: int) -> None: ...
    def reset(self) -> None: ...
    def usage(self) -> dict[str, float]: ...
    def audit(self, live: Ints) -> None: ...


class EngineView:
    """What a policy may read. Arrays are valid during the call only. ``ready``: grantable RUNNING slots in admission order;
    ``queue``: QUEUED slots without wait bits, in arrival order; ``free``: the ledger's free
    blocks before the plan; ``gap`` [C]: projected known - computed of the lead lane;
    ``computed``, ``known`` [C]: as they will stand at launch (``known`` includes pending ids)."""

    now: float
    step: int
    layers: int
    table: Table
    ledger: Ledger
    free: Longs
    ready: Ints
    queue: Ints
    gap: Ints
    known: Ints
    computed: Ints
    running: int
    max_num_seqs: int
    pools: tuple[int, ...]
    latency: LatencyModel | None


class Scheduler(Protocol):
    """Decides a step. Must work from the view alone when freshly made; may keep columns of its own; is picklable."""

    def plan(self, view: EngineView, budget: Budget) -> Grants:
        """Grants for one step: rows within budget, blocks within ``view.ledger`` (taken by the policy as it goes)."""

    def observe(self, facts: Facts) -> None:
        """One finished step."""

    def steady(self, view: EngineView) -> int:
        """Steps this plan would repeat if nothing happened (1 = unknown)."""


class Admission(Protocol):
    """Judges an arrival: None admits; an exception of the tree refuses with a typed error."""

    def judge(self, req: Request, view: EngineView) -> None: ...


class Drafter(Companion, Protocol):
    """Guesses ahead for the whole batch. ``propose`` may yield forward passes of its own and receives their results."""

    def hint(self, view: EngineView) -> Ints: ...
    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]: ...

    def shut(self) -> None:
        """The engine closes, after its last step: what is to outlive it is written now. Drafters of other packages may have none."""
        return


class LengthController(Protocol):
    """Says what drafts are worth (``ask`` before the plan, ``select`` after drafting, over the whole batch)."""

    def ask(self, view: EngineView, hint: Ints) -> Ints: ...
    def select(self, view: EngineView, grants: Grants, draft: Draft) -> Keep: ...
    def observe(self, facts: Facts) -> None: ...


class AcceptanceRule(Protocol):
    """Judges a step's drafts beside the logits; ``rows`` are the modified target rows, ``noise`` is keyed by (seed, position)."""

    lossless: bool
    seed_stable: bool

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict: ...


class Executor(Protocol):
    """Runs plans. ``submit`` never blocks; results are posted as StepDone or StepFault events. ``depth`` steps may be in flight."""

    depth: int
    layers: int
    geometry: KVGeometry

    def start(self, post: Callable[[Event], None]) -> None: ...
    def submit(self, plan: StepPlan) -> None: ...
    def cut(self) -> None: ...
    def companions(self) -> tuple[Companion, ...]: ...
    def close(self) -> None: ...


class LatencyModel(Protocol):
    """Predicts (seconds, joules) [m, 2] from features [m, 12]; answers rounded to 1 microsecond so that replays agree."""

    def predict(self, features: Floats) -> Floats: ...
    def observe(self, facts: Facts) -> None: ...


@runtime_checkable
class Program(Protocol):
    """Stands above requests: boundary events in, commands out."""

    def on(self, event: Boundary | ChildDone | Started) -> Iterable[Command]: ...
