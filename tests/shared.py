"""Where the shared data lies: beside the checkout, or where PRESAGE_SHARED says. Tests that need it skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(relative: str) -> Path:
    """Path of a file or folder of the shared data sets; skips the test if it is not there."""
    root = Path(os.environ.get("PRESAGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    path = root / "data" / relative
    if not path.exists():
        pytest.skip(f"shared data {relative} is not here")
    return path
