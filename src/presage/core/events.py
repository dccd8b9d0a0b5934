"""What enters the loop: events from outside, and commands from programs and operators. All plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from presage.core.plan import StepDone, StepFault
from presage.core.request import Request
from presage.core.types import EMPTY, Hold, Wait


@dataclass(slots=True, frozen=True)
class Arrive:
    """A request after receive. ``wait``: bits that must clear before it can be granted."""

    request: Request
    wait: Wait = Wait.NONE


@dataclass(slots=True, frozen=True)
class Abort:
    """End a request (all its branches) at once; its blocks go back when no step holds them."""

    id: str


@dataclass(slots=True, frozen=True)
class Waited:
    """A wait bit of a request cleared, or failed with an error (code, message, status)."""

    id: str
    bit: Wait
    error: tuple[str, str, int] | None = None


@dataclass(slots=True, frozen=True)
class Annotate:
    """Write a number into a column of a request (a predicted length, a score)."""

    id: str
    column: str
    value: float


@dataclass(slots=True, frozen=True)
class Tick:
    """Nothing happened; time passed."""


@dataclass(slots=True, frozen=True)
class Fork:
    """Make a new request that shares the source's KV: its ids up to ``keep`` plus ``inject``; sampling may differ (``request``)."""

    slot: int
    request: Request
    keep: int
    inject: np.ndarray = field(default_factory=lambda: EMPTY)


@dataclass(slots=True, frozen=True)
class Inject:
    """Append ids to a request as if they had been generated; ``emit`` sends them to the client too."""

    slot: int
    ids: np.ndarray
    emit: bool = True


@dataclass(slots=True, frozen=True)
class Rewrite:
    """Cut a request back to ``keep`` known ids and append ``ids``; never below what the client was sent."""

    slot: int
    keep: int
    ids: np.ndarray = field(default_factory=lambda: EMPTY)


@dataclass(slots=True, frozen=True)
class Watch:
    """Call the program when the request has ``out`` output tokens."""

    slot: int
    out: int


@dataclass(slots=True, frozen=True)
class Pause:
    """Hold a request with its KV."""

    slot: int
    hold: Hold = Hold.PAUSED


@dataclass(slots=True, frozen=True)
class Resume:
    """Let a held request run again."""

    slot: int


@dataclass(slots=True, frozen=True)
class End:
    """End a request now with a finish reason, after appending ``append``."""

    slot: int
    reason: str = "stop"
    append: np.ndarray = field(default_factory=lambda: EMPTY)


@dataclass(slots=True, frozen=True)
class Drive:
    """Make another lane choose the next tokens of a request."""

    slot: int
    lane: int


@dataclass(slots=True, frozen=True)
class Prioritise:
    """Change a request's priority (lower first)."""

    id: str
    priority: int


@dataclass(slots=True, frozen=True)
class Drain:
    """Take no new requests; the loop reports idle when the last one ended."""


@dataclass(slots=True, frozen=True)
class ResetCache:
    """Forget every cached prefix (weights changed, or an operator asked)."""


Event = Arrive | Abort | Waited | Annotate | Tick | StepDone | StepFault | Prioritise | Drain | ResetCache
Command = Fork | Inject | Rewrite | Watch | Pause | Resume | End | Drive


@dataclass(slots=True, frozen=True)
class Boundary:
    """Told to a program: a request of its reached a watched length (or ended there, ``finish`` != "")."""

    slot: int
    request: Request
    out: int
    ids: np.ndarray
    finish: str = ""


@dataclass(slots=True, frozen=True)
class ChildDone:
    """Told to a program: a forked request ended."""

    slot: int
    request: Request
    ids: np.ndarray
    finish: str


@dataclass(slots=True, frozen=True)
class Started:
    """Told to a program: its first request took a slot."""

    slot: int
    request: Request
