"""What each request asked of speculation: a cap, a latency target, whether its acceptance rule binds the drafter. A companion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from presage import verify
from presage.core.errors import ConfigError, RequestError
from presage.core.protocols import Companion
from presage.core.request import Request

UNCAPPED = (1 << 31) - 1

def binding(rule: str) -> bool:
    """Whether a rule compares drafts with the distribution they were drawn from: then what is judged must not depend on what was drawn.

    True for rules that are exact only over the draws (lossless but not seed-stable), and for unknown ones.
    """
    try:
        known = verify.get(rule)
    except ConfigError:
        return True
    return known.lossless and not known.seed_stable


def cap_of(draft: dict[str, Any] | None) -> int:
    """Draft nodes a request allows per step, from its ``draft`` field: ``num_speculative_tokens`` (0 = opt out), or method "none".

    Raises RequestError if the number is not a whole one of at least 0.
    """
    if not draft:
        return UNCAPPED
    if draft.get("method") == "none":
        return 0
    cap = draft.get("num_speculative_tokens", UNCAPPED)
    if isinstance(cap, bool) or not isinstance(cap, int) or not 0 <= cap <= UNCAPPED:
        raise RequestError(f"num_speculative_tokens must be a whole number of at least 0, got {cap!r}", param="draft")
    return cap


class Wishes(Companion):
    """Per-slot columns: ``cap`` [C] nodes, ``each`` [C] seconds allowed per token (inf = no target), ``bound`` [C] True under a rejection rule.

    The loop drives it as a companion. Without that wiring every slot has the defaults, and what ``rule``, the engine's, binds. A request's
    own rule can only bind more.
    """

    def __init__(self, rule: str = "keyed") -> None:
        self._binds = {rule: binding(rule)}
        self._bound = self._binds[rule]
        self.cap = np.empty(0, np.int32)
        self.each = np.empty(0, np.float64)
        self.bound = np.empty(0, np.bool_)
        self.targets = 0
        self.fit(64)

    def fit(self, capacity: int) -> None:
        """Make room for slots below ``capacity``."""
        more = capacity - len(self.cap)
        if more > 0:
            self.cap = np.concatenate([self.cap, np.full(more, UNCAPPED, np.int32)])
            self.each = np.concatenate([self.each, np.full(more, math.inf)])
            self.bound = np.concatenate([self.bound, np.full(more, self._bound)])

    def open(self, slot: int, req: Request) -> None:
        """Note a request's wishes. A malformed one counts as no wish: the front answers it before it comes here (``cap_of``)."""
        self.fit(slot + 1)
        self.close(slot)
        try:
            self.cap[slot] = cap_of(req.draft)
        except RequestError:
            self.cap[slot] = UNCAPPED
        self.each[slot] = req.due_each
        self.targets += math.isfinite(req.due_each)
        if req.accept not in self._binds:
            self._binds[req.accept] = binding(req.accept)
        self.bound[slot] = self._bound or self._binds[req.accept]

    def close(self, slot: int) -> None:
        """Back to the defaults."""
        self.targets -= math.isfinite(self.each[slot])
        self.cap[slot], self.each[slot], self.bound[slot] = UNCAPPED, math.inf, self._bound
