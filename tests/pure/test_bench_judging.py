"""Goals, fairness, capacity, tails, timelines, tables and the page, against values worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from presage.bench.attainment import Playback, attainment, fluidity, over_scales
from presage.bench.capacity import capacity_search
from presage.bench.compare import comparison, load_result, records_of
from presage.bench.fairness import by_tenant, fairness, jain
from presage.bench.measures import Record, as_json, record_json, summarise
from presage.bench.page import Shown, html_page
from presage.bench.rows import read_rows, write_rows
from presage.bench.svg import Axis, Curve, chart, ticks
from presage.bench.tail import doubt, requests_needed
from presage.bench.window import concurrency, in_flight, saturated, steady
from presage.core.errors import ConfigError


def done(sched: float, chunks: list[float], tenant: str = "", n_out: int = 0) -> Record:
    return Record(sched, sched, chunks[-1], chunks, 4, n_out or len(chunks), tenant=tenant)


FAILED = Record(0.0, 0.0, error="HTTP 500")


def test_attainment_counts_each_goal_and_all_together() -> None:
    records = [done(0, [0.1, 0.2]), done(0, [0.1, 0.9]), done(0, [0.5, 0.6]), FAILED]
    assert attainment(records, {"ttft": 0.2, "tpot": 0.2}) == {"ttft": 0.5, "tpot": 0.5, "all": 0.25}
    assert over_scales(records, {"ttft": 0.2, "tpot": 0.2}, [0.1, 1.0, 2.5, 4.0, 100]).tolist() == [0.0, 0.25, 0.5, 0.75, 0.75]


def test_fluidity_of_perfect_and_stalled_streams() -> None:
    goal = Playback(first=1.0, each=0.5)
    assert fluidity(done(0, [1.0, 1.5, 2.0, 2.5]), goal) == 1.0
    # Time in hand pays for a late token.
    assert fluidity(done(0, [1.0, 1.1, 1.9]), goal) == 1.0
    # A stall of 2 s, of which 0.4 s are in hand, misses floor(1.6 / 0.5) = 3 deadlines; met: the first two and the last.
    assert fluidity(done(0, [1.0, 1.1, 3.1, 3.6]), goal) == pytest.approx(3 / 6)
    assert fluidity(FAILED, goal) == 0.0


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20), st.floats(0.1, 10))
def test_jain_is_between_one_over_n_and_one_and_has_no_unit(values: list[float], scale: float) -> None:
    index = jain(values)
    assert 1 / len(values) - 1e-9 <= index <= 1 + 1e-9 and jain([v * scale for v in values]) == pytest.approx(index)
    assert jain([1, 0, 0, 0]) == 0.25 and jain([3, 3]) == 1.0 and jain([]) == 1.0


def test_tenants_are_told_apart() -> None:
    records = [done(0, [1.0], "a"), done(0, [3.0], "b"), done(1, [2.0], "a"), Record(0.0, 0.0, error="x", tenant="b")]
    found = by_tenant(records, {"ttft": 1.5})
    assert found["a"]["requests"] == 2 and found["a"]["attainment"] == 1.0 and found["b"]["failed"] == 1 and found["b"]["mean_ttft"] == 3.0
    assert fairness(records)["jain_served"] == pytest.approx(jain([1.0, 0.5]))


@pytest.mark.parametrize("true", [0.07, 1.0, 3.3, 37.0, 999.0])
def test_the_capacity_is_found(true: float) -> None:
    asked: list[float] = []

    def trial(rate: float) -> float:
        asked.append(rate)
        return 1.0 if rate <= true else 0.3

    found = capacity_search(trial, 0.9, start=1.0, tolerance=0.05)
    assert true / 1.05 <= found.rate <= true and not found.noisy and len(asked) == len(found.trials) < 25


def test_a_search_that_never_passes_or_never_fails_ends() -> None:
    assert capacity_search(lambda rate: 0.0).rate == 0.0
    assert capacity_search(lambda rate: 1.0, highest=64.0).rate == 64.0
    shares = iter([1.0, 0.5, 0.95, 0.99, 0.95, 0.95, 0.99, 0.95, 0.9])
    assert capacity_search(lambda rate: next(shares), tolerance=0.2).trials[1][1] == 0.5
    with pytest.raises(ConfigError):
        capacity_search(lambda rate: 1.0, start=0.0)


def test_capacity_of_a_queue_worked_out_on_paper() -> None:
    # M/D/1: mean wait is rho * D / (2 (1 - rho)); with D = 0.1 s the mean is under 0.2 s up to rho = 0.8, so 8 requests/s.
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1.0, 60_000)

    def trial(rate: float) -> float:
        free, waits = 0.0, 0.0
        for at in np.cumsum(gaps / rate).tolist():
            waits += max(0.0, free - at)
            free = max(free, at) + 0.1
        return 1.0 if waits / len(gaps) <= 0.2 else 0.0

    assert capacity_search(trial, 0.9, start=2.0, tolerance=0.02).rate == pytest.approx(8.0, rel=0.05)


def test_how_many_requests_a_tail_needs() -> None:
    # MLPerf's table for a confidence of 0.99.
    assert [requests_needed(t, 0.99) for t in (0, 1, 5, 10, 50)] == [459, 662, 1307, 2010, 6898]
    assert [requests_needed(t, 0.90) for t in (0, 1, 5, 10)] == [44, 64, 127, 197]
    assert doubt(458, 0, 0.99) <= 0.0101


def test_requests_in_flight_over_time() -> None:
    records = [done(10, [11.0, 13.0]), done(10, [12.0, 12.5]), FAILED]
    records[2].t_sched = 10.0
    found = in_flight(records)
    t, n = found["waiting"]
    assert dict(zip(t.tolist(), n.tolist())) == {0.0: 2, 1.0: 1, 2.0: 0}
    t, n = found["decoding"]
    assert dict(zip(t.tolist(), n.tolist())) == {1.0: 1, 2.0: 2, 2.5: 1, 3.0: 0}
    assert concurrency(records) == {"peak": 2.0, "mean": pytest.approx(5.5 / 3)}


def test_the_ramp_is_cut_and_saturation_is_seen() -> None:
    calm = [done(i * 0.5, [i * 0.5 + 0.2 + 0.01 * (i % 3)]) for i in range(400)]
    queue = [done(i * 0.5, [i * 0.5 + 0.05 * i, i * 0.5 + 0.06 * i]) for i in range(400)]
    assert len(steady(calm)) == pytest.approx(320, abs=2)
    assert not saturated(calm) and saturated(queue)


def test_records_survive_a_table(tmp_path: Path) -> None:
    records = [done(1.5, [2.0, 2.25], "a"), Record(2.0, error="HTTP 503: ä,\n", session=3, turn=1)]
    records[0].counts, records[0].held = [1, 2], 0.125
    write_rows(records, tmp_path / "r.csv")
    again = read_rows(tmp_path / "r.csv")
    assert repr(again) == repr(records)
    with pytest.raises(ConfigError, match=r"\.parquet or \.csv"):
        write_rows(records, tmp_path / "r.txt")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="not a table"):
        read_rows(tmp_path / "x.csv")


def test_records_survive_parquet_or_its_absence_is_told(tmp_path: Path) -> None:
    records = [done(1.5, [2.0, 2.25], "a"), FAILED]
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pyarrow"):
            write_rows(records, tmp_path / "r.parquet")
        return
    write_rows(records, tmp_path / "r.parquet")
    assert repr(read_rows(tmp_path / "r.parquet")) == repr(records)


def test_results_are_compared(tmp_path: Path) -> None:
    a, b = (as_json(summarise([done(0, [ttft, ttft + 1], n_out=11)])) for ttft in (1.0, 1.5))
    text = comparison({**a, "config": {"seed": 1}}, {**b, "valid": False, "config": {"seed": 2}})
    assert re.search(r"median_ttft_ms\s+1000.000\s+1500.000\s+\+50.0%", text)
    assert "client of B sent late" in text and "seed differs: 1 and 2" in text
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError):
        load_result(tmp_path / "x.json")
    again = records_of({"records": [record_json(FAILED)]})
    assert math.isnan(again[0].t_done) and again[0].error == "HTTP 500"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0, 0.9) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert ticks(1, 1000, log=True) == [1, 10, 100, 1000] and ticks(2, 11, log=True) == [2, 5, 10] and ticks(3, 3.5, log=True) == [3, 3.5]


def test_a_chart_is_xml_and_has_its_curves() -> None:
    curves = [Curve("one", np.array([1, 10, np.inf]), np.array([0, 5, 5.0])), Curve("none", np.empty(0), np.empty(0))]
    text = chart("a < b", Axis("x", log=True), Axis("y"), curves)
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == "a < b" and text.count('class="l c0"') == 2
    # The second point is at the right edge of the plot; 5 % of the height stay free above it, and a line of names.
    top, bottom = 28 + 14, 280 - 42
    assert f"L448.0 {bottom - (bottom - top) / 1.05:.1f}" in text


def test_the_page_holds_every_plot_and_loads_nothing() -> None:
    rng = np.random.default_rng(0)

    def run(rate: float) -> Shown:
        at = np.cumsum(rng.exponential(1 / rate, 3000))
        records = [done(t, [t + 0.1 * rate, *(t + 0.1 * rate + 0.02 * np.arange(1, 30))], f"t{i % 2}") for i, t in enumerate(at.tolist())]
        return Shown(f"{rate:g}/s", records, rate, {"config": {"rate": rate}}, {"KV use": (at, at % 1)}, joules=50.0)

    page = html_page([run(r) for r in (1.0, 2.0, 4.0)], {"ttft": 0.3, "tpot": 0.05})
    titles = ["Time to First Token", "against rate", "Throughput and goodput", "SLO attainment", "over SLO scale", "requests in flight"]
    titles += ["KV use", "Tenants"]
    assert all(title in page for title in titles) and "Valid:" in page and "J/token" in page
    assert len(page) < 1_000_000 and not re.search(r"(src|href)=|url\(|<script|@import", page)
    late = Shown("late", [Record(0.0, 0.5, 2.0, [1.0, 2.0], 1, 2)])
    assert "INVALID" in html_page([late])
    assert "0.00 ms late" in html_page([])
