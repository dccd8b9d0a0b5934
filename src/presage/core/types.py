"""Small enumerations and array aliases used by every room."""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Words = NDArray[np.uint64]

EMPTY: Ints = np.empty(0, np.int32)
EMPTY.flags.writeable = False


class State(IntEnum):
    """Where a request stands. See the state table in ``core.table``."""

    FREE = 0
    QUEUED = 1
    RUNNING = 2
    HELD = 3
    ENDING = 4


class Wait(IntFlag):
    """Why a QUEUED request cannot be granted yet. Events clear the bits; each bit has a deadline."""

    NONE = 0
    GRAMMAR = 1
    ADAPTER = 2
    KV_IN = 4
    SCORE = 8
    PROGRAM = 16
    QUOTA = 32
    WEIGHTS = 64


class Hold(IntEnum):
    """Why a HELD request keeps its KV without being granted."""

    NO = 0
    PAUSED = 1
    DRAIN = 2
    HANDOFF = 3
    IMPORT = 4


class Kind(IntEnum):
    """What a request wants. PREFILL: prompt and first token here, the rest elsewhere."""

    GENERATE = 0
    PREFILL = 1
    EMBED = 2
    SCORE = 3


class At(IntEnum):
    """What reaching ``limit`` means."""

    LENGTH = 0
    BOUNDARY = 1
    HANDOFF = 2


class How(IntEnum):
    """How an evicted request's KV is dropped."""

    RECOMPUTE = 0
    SWAP = 1


class Fed(IntEnum):
    """Where the next input id comes from: HOST must see the previous result first, DEVICE reads it in place."""

    HOST = 0
    DEVICE = 1


class Want(IntFlag):
    """What the executor returns for a span besides writing its KV."""

    NONE = 0
    SAMPLE = 1
    PROMPT_LOGPROBS = 2
    POOL = 4
    HIDDEN = 8
    TOPK = 16
    EXIT = 32


class Why(IntEnum):
    """Reason codes in ``Grants.why`` and in the decision log; ``presage explain`` words them."""

    BUDGET = 1
    NO_BLOCKS = 2
    MAX_SEQS = 3
    EVICTED = 4
    WAITING = 5
    CHUNKED = 6
    POLICY_FAILED = 7
    STALLED = 8


class Finish(IntEnum):
    """Terminal reasons. ``name.lower()`` is what the API reports (EOS and STOP are both ``stop``)."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    MOVED = 5
    DONE = 6


class Flag(IntFlag):
    """Per-request facts that the loop tests for the whole batch at once."""

    NONE = 0
    IGNORE_EOS = 1
    STOP_IDS = 2
    STOP_STRINGS = 4
    GRAMMAR = 8
    PROMPT_LOGPROBS = 16
    PROGRAM = 32
