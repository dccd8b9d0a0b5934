"""What must be set before torch, and with it the OpenMP runtime, is loaded. Imports nothing, so a command line can call it first."""

from __future__ import annotations

import os
import sys

SPIN_COUNT = 20_000
"""Turns a waiting worker spins before it sleeps: 0.3 to 1 ms (a `pause` takes 40-140 cycles). Longer than the gaps within a
step, where waking a sleeper would cost 20-60 us, and short enough that an idle engine does not burn a core."""


def prepare_environment() -> bool:
    """Set how long idle workers spin, unless the user did; True if torch was not imported yet, so that it has an effect."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        os.environ.setdefault("KMP_BLOCKTIME", "1")
    return "torch" not in sys.modules
