"""What a request is (cold, immutable) and what comes back for it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from presage.core.sampling_params import SamplingParams
from presage.core.types import EMPTY, Kind


class Request(msgspec.Struct, kw_only=True, frozen=True):
    """One request after tokenisation. Ids are int32, times are seconds on the engine's clock, ``priority`` lower first.

    ``emitted`` holds output ids the client already has (a request resumed after a restart): they are known, not emitted again.
    ``due_first`` is the absolute deadline of the first token, ``due_each`` the allowance per later token, ``due_end`` the absolute end; inf = none.
    ``sink`` is "client" or the id of a program that consumes the tokens. ``salt`` isolates its prefix-cache entries.
    """

    id: str
    prompt: np.ndarray
    sampling: SamplingParams = msgspec.field(default_factory=SamplingParams)
    emitted: np.ndarray = msgspec.field(default_factory=lambda: EMPTY)
    arrival: float = 0.0
    kind: Kind = Kind.GENERATE
    model: str = ""
    tenant: str = ""
    salt: bytes = b""
    adapter: str | None = None
    priority: int = 0
    due_first: float = math.inf
    due_each: float = math.inf
    due_end: float = math.inf
    program: str | None = None
    stage: str | None = None
    sink: str = "client"
    draft: dict[str, Any] | None = None
    accept: str = "keyed"
    branch: int = 0
    extras: dict[str, Any] = msgspec.field(default_factory=dict)


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one output position: the chosen id's, its rank (1 = most likely), and the k most likely ids."""

    id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Emission(msgspec.Struct, array_like=True):
    """What the loop tells the stream owner about one request in one step.

    ``offset`` is the index of the first id in the request's output, so that (id, branch, offset) makes emission exactly-once.
    ``finish`` is "" while running, else stop | length | abort | error | done. ``stop`` is the stop id or string that ended it.
    ``error`` is (code, message, status). ``cut`` is the number of characters a stop string cuts from the end of the text.
    """

    id: str
    branch: int
    offset: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: str = ""
    stop: int | str | None = None
    error: tuple[str, str, int] | None = None
    n_prompt: int = 0
    n_cached: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: list[float] | None = None
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)  # arrival, first scheduled, first token (engine clock)
    preemptions: int = 0
