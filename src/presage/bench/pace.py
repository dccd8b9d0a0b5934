"""Real-time priority for the client: on a machine that is full, a sleeping process is woken milliseconds late, a real-time one is not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def realtime(wanted: bool) -> Iterator[bool]:
    """SCHED_FIFO while inside, if it is wanted and the system allows it; yields whether it was given.

    Meant for a client that uses a small share of a core: the kernel lets nothing ordinary run on its core while it does.
    """
    if not wanted or not hasattr(os, "sched_setscheduler"):
        yield False
        return
    before, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, before, param)
