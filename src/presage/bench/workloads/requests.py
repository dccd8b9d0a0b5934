"""Workloads as ``core.request.Request``: what the simulator is fed.

Contents come from ids where the workload has them, else from its hashes, else from a name: equal hashes give equal ids, a session's turns
share their prefix, anything else shares nothing. So prefix caching behaves as it would with the texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from presage.bench.workloads.table import Workload
from presage.core.errors import ConfigError
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams

SPECIAL = 1024
"""Made ids begin here: far from the special ids of any vocabulary."""
_MASK = 0x3FFFFFFF


@lru_cache(maxsize=1 << 16)
def _params(n_out: int) -> SamplingParams:
    # Parameters are read only, and checking them costs more than anything else here: equal ones are one object.
    return SamplingParams(max_tokens=n_out, ignore_eos=True)


def text_ids(key: int, start: int, stop: int) -> np.ndarray:
    """Ids of positions [start, stop) of a made-up text, int32: texts with other keys differ in every block."""
    # A hash of the key is where it begins: neighbouring keys would otherwise be each other's text, shifted.
    base = (key * 0x9E3779B97F4A7C15 >> 20) & _MASK
    return np.asarray((np.arange(start, stop, dtype=np.int64) + base & _MASK) + SPECIAL, np.int32)


def prompt_ids(w: Workload, row: int) -> np.ndarray:
    """The prompt [n_in] int32. Raises ConfigError if the row has text but no ids yet (``contents.tokenised``)."""
    n = int(w.n_in[row])
    if w.ids is not None and len(known := w.ids.row(row)):
        return np.asarray(known, np.int32)
    if n < 1:
        raise ConfigError(f"workload {w.name}: the prompt of row {row} is text; tokenise it first", param="workload")
    key = int(w.session[row]) + (1 << 40) if w.session[row] >= 0 and w.hashes is None else row
    if w.hashes is None:
        return text_ids(key, 0, n)
    hashes = w.hashes.row(row)
    ids = hashes[:, None] * w.block + np.arange(w.block)
    known = np.asarray(((ids & _MASK) + SPECIAL).ravel()[:n], np.int32)
    # Some recorders do not hash the last, partial block: its content is the request's own.
    return known if len(known) == n else np.concatenate([known, text_ids(row + (1 << 41), len(known), n)])


def make_request(w: Workload, row: int, arrival: float, replies: bool = False) -> Request:
    """One row, arriving at ``arrival`` (s). ``replies``: recorded answers go along, for drafts and stops that behave as they would."""
    tenant = w.tenants[w.tenant[row]]
    extras = {"reply": w.replies.row(row)} if replies and w.replies is not None and len(w.replies.row(row)) else {}
    return Request(
        id=f"{w.name}{row}",
        prompt=prompt_ids(w, row),
        sampling=_params(max(1, int(w.n_out[row]))),
        arrival=arrival,
        tenant=tenant,
        salt=tenant.encode(),
        priority=int(w.priority[row]),
        due_first=arrival + float(w.due_first[row]),
        due_each=float(w.due_each[row]),
        due_end=arrival + float(w.due_end[row]),
        program=None,
        extras=extras,
    )


class Requests:
    """The requests of a workload, in order of arrival, one by one. ``after`` gives those that an ended one causes: sessions, closed loops."""

    def __init__(self, workload: Workload, replies: bool = False) -> None:
        self.workload, self.replies = workload, replies
        self._next: dict[int, list[int]] = {}
        for row in np.flatnonzero(workload.after >= 0).tolist():
            self._next.setdefault(int(workload.after[row]), []).append(row)

    def __len__(self) -> int:
        return len(self.workload)

    def __iter__(self) -> Iterator[Request]:
        w = self.workload
        for row in w.roots.tolist():
            yield make_request(w, row, float(w.arrival[row]), self.replies)

    def after(self, request: Request, now: float) -> list[Request]:
        """What follows a request that ended at ``now``, with absolute arrivals. Requests of other workloads cause nothing."""
        w, name = self.workload, request.id.removeprefix(self.workload.name)
        if not name.isdecimal():
            return []
        return [make_request(w, row, now + float(w.think[row]), self.replies) for row in self._next.get(int(name), ())]


def to_requests(workload: Workload, replies: bool = False) -> Iterator[Request]:
    """Every request that waits for no other, in order of arrival; for sessions and closed loops use ``Requests``, which has the rest."""
    return iter(Requests(workload, replies))
