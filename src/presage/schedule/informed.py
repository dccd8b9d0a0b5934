"""Policies that read a request when it arrives (its prompt, tenant, stage): a policy that is also a companion of the loop.

The loop calls ``open`` and ``close`` of a policy that is among its companions. Without that, a policy must still work from the view alone:
what it would have read is then unknown.
"""

from __future__ import annotations

from presage.core.protocols import Companion
from presage.schedule.ranked import Ranked


class Informed(Ranked, Companion):
    """A ranking policy that hears of arrivals; columns of its own are filled in ``open`` and emptied in ``close``."""
