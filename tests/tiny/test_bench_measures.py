"""Measures and arrivals against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from presage.bench.arrivals import arrival_times
from presage.bench.measures import Record, as_json, mean, parse_goodput, percentile, summarise
from presage.bench.report import serving_report
from presage.core.errors import ConfigError


def done(sched: float, chunks: list[float], n_out: int, n_in: int = 5, late: float = 0.0) -> Record:
    return Record(sched, sched + late, chunks[-1], chunks, n_in, n_out)


def test_a_request_by_hand() -> None:
    r = done(10.0, [10.5, 10.7, 11.1], n_out=4, late=0.1)
    assert r.ttft == pytest.approx(0.5)
    assert r.e2el == pytest.approx(1.1)
    assert r.tpot == pytest.approx(0.2)


def test_latency_counts_from_the_schedule_not_from_the_send() -> None:
    assert done(0.0, [3.0], 1, late=2.9).ttft == 3.0


def test_a_single_token_has_no_tpot_and_passes_that_goal() -> None:
    r = done(0.0, [0.1], 1)
    assert r.tpot is None
    assert r.meets({"tpot": 0.001, "ttft": 0.2})
    assert not r.meets({"ttft": 0.05})


def test_a_failed_request_is_infinitely_slow_and_misses_every_goal() -> None:
    failed = Record(0.0, 0.0, error="HTTP 500")
    s = summarise([done(0.0, [0.1, 0.2], 2), failed], {"ttft": 1.0})
    assert (s.completed, s.failed, s.good) == (1, 1, 1)
    assert percentile(s.samples["ttft"], 99) == math.inf
    assert mean(s.samples["ttft"]) == pytest.approx(0.1)
    assert as_json(s)["p99_ttft_ms"] is None


def test_a_run_by_hand() -> None:
    s = summarise([done(0.0, [1.0, 2.0], 3), done(1.0, [2.0, 4.0], 2)], {"ttft": 1.0, "tpot": 1.0})
    assert s.duration == 4.0
    assert s.rates() == {"request_throughput": 0.5, "output_throughput": 1.25, "total_token_throughput": 3.75, "request_goodput": 0.25}
    assert s.samples["itl"] == [1.0, 2.0]
    assert s.samples["tpot"] == [0.5, 2.0]


def test_the_report_has_the_labels_scripts_read() -> None:
    text = serving_report(summarise([done(0.0, [0.1, 0.2], 2)], {"ttft": 1.0}))
    for label in ("Successful requests:", "Benchmark duration (s):", "Request throughput (req/s):", "Output token throughput (tok/s):"):
        assert label in text
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        assert all(f"{word} {name} (ms):" in text for word in ("Mean", "Median", "P99"))
    assert "Request goodput (req/s):" in text


def test_a_late_client_is_called_invalid() -> None:
    assert summarise([done(0.0, [0.1], 1, late=0.05)]).valid is False
    assert summarise([done(0.0, [0.1], 1, late=0.005)]).valid is True
    assert "INVALID" in serving_report(summarise([done(0.0, [0.1], 1, late=0.05)]))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_equals_numpy(values: list[float], p: float) -> None:
    assert percentile(values, p) == pytest.approx(np.percentile(values, p), rel=1e-9, abs=1e-6)


def test_goodput_words() -> None:
    assert parse_goodput(["ttft:200", "tpot:50"]) == {"ttft": 0.2, "tpot": 0.05}
    for bad in ("ttft", "speed:3", "ttft:x", "ttft:-1"):
        with pytest.raises(ConfigError):
            parse_goodput([bad])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_wanted_rate_and_variation(burstiness: float) -> None:
    at = arrival_times(100_000, 50.0, burstiness, seed=3)
    gaps = np.diff(at, prepend=0.0)
    assert at[-1] == pytest.approx(2000.0)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.02)


def test_arrivals_repeat_with_the_seed_and_only_with_it() -> None:
    assert np.array_equal(arrival_times(50, 3.0, 1.0, 7), arrival_times(50, 3.0, 1.0, 7))
    assert not np.array_equal(arrival_times(50, 3.0, 1.0, 7), arrival_times(50, 3.0, 1.0, 8))


def test_infinite_rate_and_infinite_burstiness() -> None:
    assert not arrival_times(5, math.inf).any()
    assert np.allclose(arrival_times(4, 2.0, math.inf), [0.5, 1.0, 1.5, 2.0])
    for rate, burstiness in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ConfigError):
            arrival_times(3, rate, burstiness)
