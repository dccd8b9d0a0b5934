"""Speculation changes how fast tokens come, never which: drafters with forward passes, with every lossless rule, length policy and load."""

from __future__ import annotations

import pytest

from tests.tiny.speculation_work import MODELS, Run, check_run, runs


@pytest.mark.parametrize("run", runs(MODELS), ids=", ".join)
def test_tokens_are_those_of_a_run_without_drafts(run: Run) -> None:
    check_run(MODELS[run[0]], run)
