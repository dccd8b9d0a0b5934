"""What holds for every test."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def interrupts_arrive() -> None:
    """A runner in the background of a shell is started with Ctrl-C ignored, and so would be all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
