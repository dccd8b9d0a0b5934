"""Speculation changes how fast tokens come, never which: drafters that look up, with every lossless rule, length policy and load."""

from __future__ import annotations

import pytest

from tests.tiny.speculation_work import LOOK_UPS, Run, check_run, runs


@pytest.mark.parametrize("run", runs(LOOK_UPS), ids=", ".join)
def test_tokens_are_those_of_a_run_without_drafts(run: Run) -> None:
    check_run(LOOK_UPS[run[0]], run)
