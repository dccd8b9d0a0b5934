"""The request journal: what each client was sent, so that a killed engine costs time and never a token or a duplicate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from presage.core.errors import PresageError
from presage.core.request import Emission, Request

MAX_ATTEMPTS = 3


@dataclass(slots=True)
class Entry:
    """One request in the front's care. ``sent[b]`` holds the ids branch b's client has; ``ended`` the branches that finished."""

    request: Request
    queue: asyncio.Queue[Emission | PresageError] = field(default_factory=asyncio.Queue)
    sent: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    attempts: int = 1

    def fresh(self, e: Emission) -> Emission | None:
        """The part of an emission the client does not have yet; None if there is none. Out-of-order parts cannot occur: sockets keep order."""
        if e.branch in self.ended:
            return None
        have = self.sent.setdefault(e.branch, [])
        drop = max(0, len(have) - e.offset)
        if drop:
            e.ids = e.ids[drop:]
            e.logprobs = e.logprobs[drop:] if e.logprobs else e.logprobs
            e.prompt_logprobs = None
            e.offset += drop
        have += e.ids
        if e.finish:
            self.ended.add(e.branch)
        return e if e.ids or e.finish or e.prompt_logprobs or e.pooled else None

    def resumed(self) -> Iterator[Request]:
        """What a new engine must be told: the request as it was, or each unfinished branch with the ids it already has."""
        if not any(self.sent.values()) and not self.ended:
            yield self.request
            return
        plain = msgspec.structs.replace(self.request.sampling, n=1)
        for branch in range(max(1, self.request.sampling.n)):
            if branch not in self.ended:
                ids = np.array(self.sent.get(branch, []), np.int32)
                yield msgspec.structs.replace(self.request, sampling=plain, emitted=ids, branch=branch)


class Journal:
    """Entries by request id, in order of arrival."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def open(self, request: Request) -> Entry:
        """Start an entry."""
        entry = self.entries[request.id] = Entry(request)
        return entry

    def close(self, request_id: str) -> None:
        """Forget an entry."""
        self.entries.pop(request_id, None)

    def deliver(self, emissions: list[Emission]) -> None:
        """Hand what is new to whoever waits for it."""
        for e in emissions:
            entry = self.entries.get(e.id)
            if entry is not None and (part := entry.fresh(e)) is not None:
                entry.queue.put_nowait(part)

    def resumed(self) -> list[Request]:
        """Requests for a new engine. A request that was there at every death may be their cause: after three it ends with an error."""
        out: list[Request] = []
        for entry in self.entries.values():
            entry.attempts += 1
            if entry.attempts > MAX_ATTEMPTS:
                entry.queue.put_nowait(_poison(entry.request.id))
            else:
                out.extend(entry.resumed())
        return out

    def fail(self, error: PresageError) -> None:
        """End every entry with an error."""
        for entry in self.entries.values():
            entry.queue.put_nowait(error)


def _poison(request_id: str) -> PresageError:
    from presage.core.errors import EngineDead

    return EngineDead(f"the engine died {MAX_ATTEMPTS} times with request {request_id} in it")
