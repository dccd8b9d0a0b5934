"""Joules: counters that wrap and are reset, sources that cannot be read, whose joules they are, and the figures made of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from presage.bench.energy import Counter, Energy, Meter, Modelled, Nvml, Rapl, attribute, idle_watts, open_source
from presage.bench.measures import Record
from presage.core.errors import ConfigError
from presage.simulate.latency.hardware import hardware

BOX = hardware("epyc-zen4-2c")
NVML = """
static unsigned long long energy[2] = {1000, 5000};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { if (i > 1) return 2; *h = &energy[i]; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *e) { *e = *(unsigned long long *)h += 250; return 0; }
const char *nvmlErrorString(int code) { return code == 2 ? "invalid argument" : "unknown"; }
"""


class Scripted:
    """A source that draws a constant power by a clock of its own."""

    name, about = "rapl", "scripted"

    def __init__(self, watts: float) -> None:
        self.watts, self.began = watts, time.monotonic()

    def joules(self) -> float:
        return self.watts * (time.monotonic() - self.began)


def zone(root: Path, n: int, uj: int, limit: int = 999, name: str = "package-0") -> Path:
    """A powercap zone."""
    folder = root / f"intel-rapl:{n}"
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", str(uj)), ("max_energy_range_uj", str(limit))):
        (folder / file).write_text(text + "\n")
    return folder


def test_counters_wrap_and_are_reset() -> None:
    wraps = Counter(90, 99)
    assert [wraps.add(v) for v in (95, 4, 4, 99, 0)] == [5, 14, 14, 109, 110]
    resets = Counter(1000)
    assert [resets.add(v) for v in (1500, 100, 160)] == [500, 500, 560]  # growth across the reset is not guessed


def test_rapl_sums_packages_and_wraps(tmp_path: Path) -> None:
    a, b = zone(tmp_path, 0, 900), zone(tmp_path, 1, 100, name="package-1")
    zone(tmp_path, 2, 5, name="psys")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a sub-domain: its joules are in the package already
    source = Rapl(tmp_path)
    (a / "energy_uj").write_text("49")  # 900 -> 999, 0 -> 49
    (b / "energy_uj").write_text("400")
    assert source.joules() == pytest.approx((149 + 300) / 1e6)
    assert "2 processor packages" in source.about


def test_rapl_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no RAPL package"):
        Rapl(tmp_path)
    (zone(tmp_path, 0, 1) / "energy_uj").chmod(0)
    if os.geteuid() == 0:  # root reads it anyway, so what the kernel would say to others is said for it
        plain = Path.read_text

        def refused(self: Path, *args: object, **kinds: object) -> str:
            if self.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(self))
            return plain(self, *args, **kinds)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ConfigError, match="only root may read it"):
        Rapl(tmp_path)
    monkeypatch.setattr("presage.bench.energy.Rapl.__init__.__defaults__", (tmp_path,))
    said: list[str] = []
    found = open_source("auto", lambda: Modelled(BOX, lambda: 0.0), say=said.append)
    assert found.name == "modelled" and "only root" in said[0] and "modelled" in said[-1]
    with pytest.raises(ConfigError, match="unknown source"):
        open_source("wattmeter", lambda: Modelled(BOX, lambda: 0.0))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_nvml_through_a_library_with_its_symbols(tmp_path: Path) -> None:
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.c")], check=True)
    source = Nvml(library=str(library))
    assert source.joules() == pytest.approx(0.5) and source.joules() == pytest.approx(1.0)
    assert Nvml([1], str(library)).joules() == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="invalid argument"):
        Nvml([5], str(library))
    with pytest.raises(ConfigError, match="not on this machine"):
        Nvml(library=str(tmp_path / "absent.so"))
    assert ctypes.sizeof(ctypes.c_ulonglong) == 8


def test_modelled_joules_follow_use() -> None:
    used = [0.0]
    rest, busy = Modelled(BOX, lambda: 0.0), Modelled(BOX, lambda: used[0])
    with Meter(rest, 0.01) as idle, Meter(busy, 0.01) as meter:
        time.sleep(0.1)
        used[0] = 0.05
    assert idle.total / idle.seconds == pytest.approx(BOX.watts * BOX.static, rel=0.01)
    assert meter.total == pytest.approx(BOX.watts * (BOX.static * meter.seconds + (1 - BOX.static) * 0.05), rel=0.01)
    used[0] = 1e9  # never more than all of the device
    assert busy.joules() <= BOX.watts * (time.monotonic() - busy._began)


def test_meter_and_rest() -> None:
    assert idle_watts(Scripted(8.0), 0.1) == pytest.approx(8.0, rel=0.02)
    with Meter(Scripted(20.0), 0.01) as meter:
        time.sleep(0.1)
    assert len(meter.times) >= 3 and meter.total == pytest.approx(20.0 * meter.seconds, rel=0.02)


def record(sent: float, first: float, done: float, n_in: int = 10, n_out: int = 4, error: str = "") -> Record:
    return Record(sent, sent, done, [first, done], n_in, n_out, error)


def test_those_in_flight_share_the_draw() -> None:
    times, joules = [0.0, 10.0], [0.0, 100.0]  # 10 W
    shares = attribute(times, joules, [record(0, 1, 4), record(2, 3, 6), record(0, 1, 9, error="lost")])
    # alone 0..2, both 2..4, alone 4..6
    assert shares.tolist() == [[10.0, 20.0], [5.0, 25.0], [0.0, 0.0]]
    twice = attribute(times, joules, [record(0, 2, 5), record(5, 7, 13 - 3)])
    assert twice.sum() == pytest.approx(100.0)
    assert attribute(times, joules, []).shape == (0, 2)


SPANS = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5), st.floats(0.01, 5)), min_size=1, max_size=12)


@given(SPANS, st.lists(st.floats(0, 50), min_size=2, max_size=9))
def test_shares_add_up_to_the_meter(spans: list[tuple[float, float, float]], growth: list[float]) -> None:
    records = [record(a, a + b, a + b + c) for a, b, c in spans]
    last = max(r.t_done for r in records)
    records.append(record(0.0, 0.0, last))  # so that there is no gap
    times, joules = np.linspace(0.0, last, len(growth)), np.cumsum(growth)
    shares = attribute(times.tolist(), joules.tolist(), records)
    assert (shares >= 0).all() and shares.sum() == pytest.approx(joules[-1] - joules[0], rel=1e-6, abs=1e-6)


def meter(joules: float, seconds: float, name: str = "rapl") -> Meter:
    made = Meter(Scripted(1.0))
    made.source.name = name
    made.times, made.joules = [0.0, seconds], [0.0, joules]
    return made


def test_figures() -> None:
    found = Energy.of(meter(100.0, 10.0), [record(0, 2, 10), record(0, 2, 10, n_out=6), record(0, 1, 2, error="lost")], idle=4.0, correct=1)
    figures = {name: value for name, value, _ in found.figures()}
    assert figures["energy above rest"] == 60.0 and figures["mean power"] == 10.0 and figures["per request"] == 50.0
    assert figures["per output token"] == 10.0 and figures["per correct answer"] == 100.0 and figures["accuracy"] == 0.5
    assert figures["accuracy per watt (IPW)"] == 0.05 and figures["accuracy per joule (IPJ)"] == 0.01
    assert figures["until first tokens, per prompt token"] == 1.0 and figures["after first tokens, per later token"] == 10.0
    assert len(found.lines()) == len(figures) and all(line.endswith("(measured, rapl)") for line in found.lines())
    modelled = Energy.of(meter(1.0, 1.0, "modelled"), [record(0, 0.5, 1)], idle=0.0, correct=0)
    assert all(line.endswith("(modelled)") for line in modelled.lines()) and modelled.as_dict()["per_correct_answer"] is None
    with pytest.raises(ConfigError, match="no request succeeded: lost"):
        Energy.of(meter(1.0, 1.0), [record(0, 1, 2, error="lost")], idle=0.0)
