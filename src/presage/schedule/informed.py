"""Policies that read a request when it arrives (its prompt, tenant, stage): a policy that is also a companion of the loop.

The loop calls ``open`` and ``close`` of a policy that is among its companions. Without that, a policy must still work from the view alone:
what it would have read is then unknown.
"""

from __future__ import annotations

from presage.core.plan import NewIds
from presage.core.request import Request
from presage.schedule.ranked import Ranked


class Informed(Ranked):
    """A ranking policy that hears of arrivals; columns of its own are filled in ``open`` and emptied in ``close``."""

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot."""

    def advance(self, new: NewIds) -> None:
        """Nothing follows from the ids themselves."""

    def rewind(self, slot: int, known: int) -> None:
        """What was read at arrival stays true."""

    def fork(self, src: int, dst: int, req: Request) -> None:
        """A branch is a request of its own."""
        self.open(dst, req)

    def save(self, slot: int) -> bytes | None:
        """Rebuilt by ``open``."""
        return None

    def load(self, slot: int, blob: bytes) -> None:
        """Rebuilt by ``open``."""

    def close(self, slot: int) -> None:
        """The request left the slot."""
