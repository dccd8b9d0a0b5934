"""Joules of a run, and whose they are: RAPL or NVML counters where they can be read, else a model, and every figure says which.

Metrics are those of arXiv 2511.07885: accuracy per mean watt (IPW, which a slow device flatters) and per joule (IPJ). A counter sees the
package or the board, whatever runs on it; so the draw at rest is measured first, and figures come gross and net of it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from presage.bench.measures import Record
from presage.core.errors import ConfigError
from presage.core.types import Floats
from presage.simulate.latency.hardware import Hardware

POWERCAP = Path("/sys/class/powercap")
PERIOD = 0.05
"""Seconds between two readings: counters move every millisecond (RAPL) to tenth of a second (boards)."""


class Source(Protocol):
    """Something that counts joules. ``name``: rapl, nvml or modelled; ``about``: what is inside the boundary."""

    name: str
    about: str

    def joules(self) -> float:
        """Joules since the source was made; never falls."""


class Counter:
    """Sum of a counter's growth. ``limit``: its largest value before it starts at zero again (0: it only ever does so when it is reset)."""

    def __init__(self, first: int, limit: int = 0) -> None:
        self.last, self.limit, self.total = first, limit, 0

    def add(self, now: int) -> int:
        """Take a reading; returns the growth so far. After a reset the growth of that period is lost rather than guessed."""
        if now >= self.last:
            self.total += now - self.last
        elif self.limit:
            self.total += now - self.last + self.limit + 1
        self.last = now
        return self.total


class Rapl:
    """Processor packages through Linux's powercap (Intel and AMD). Raises ConfigError, saying why, where they cannot be read."""

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self.files = [zone / "energy_uj" for zone in sorted(root.glob("*-rapl:*")) if zone.name.count(":") == 1 and _is_package(zone)]
        if not self.files:
            raise ConfigError(f"no RAPL package under {root}: the processor, the virtual machine or the container has none", param="source")
        try:
            self.counters = [Counter(_number(f), _number(f.with_name("max_energy_range_uj"))) for f in self.files]
        except PermissionError:
            raise ConfigError(
                f"RAPL is at {self.files[0]} but only root may read it (since 2020, against side channels): run as root, or have root run "
                f"chmod a+r {root}/*/energy_uj",
                param="source",
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"RAPL at {self.files[0]} cannot be read: {error}", param="source") from None
        self.about = f"RAPL, {len(self.files)} processor package{'s' * (len(self.files) > 1)}, everything that runs on it"

    def joules(self) -> float:
        """All packages together."""
        return sum(c.add(_number(f)) for c, f in zip(self.counters, self.files)) / 1e6


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _number(path: Path) -> int:
    return int(path.read_text())


class Nvml:
    """NVIDIA boards by their energy counters (Volta and later). ``devices``: indices; all by default. Raises ConfigError without them."""

    name = "nvml"

    def __init__(self, devices: Sequence[int] = (), library: str = "libnvidia-ml.so.1") -> None:
        try:
            self._lib: Any = ctypes.CDLL(library)
        except OSError:
            raise ConfigError(f"no NVML: {library} is not on this machine", param="source") from None
        self._lib.nvmlErrorString.restype = ctypes.c_char_p
        self._call("nvmlInit_v2")
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        self._handles = [self._handle(i) for i in (devices or range(count.value))]
        if not self._handles:
            raise ConfigError("NVML finds no GPU", param="source")
        self.counters = [Counter(self._read(h)) for h in self._handles]
        self.about = f"NVML, {len(self._handles)} GPU board{'s' * (len(self._handles) > 1)} without the host"

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._lib, name)(*args)
        if code:
            raise ConfigError(f"{name}: {self._lib.nvmlErrorString(code).decode()}", param="source")

    def _handle(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def _read(self, handle: ctypes.c_void_p) -> int:
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(value))
        return value.value

    def joules(self) -> float:
        """All boards together."""
        return sum(c.add(self._read(h)) for c, h in zip(self.counters, self._handles)) / 1e3


class Modelled:
    """A hardware entry's watts: its static share all the time, the rest by use. ``used``: device-seconds in use so far (1 = all of it)."""

    name = "modelled"

    def __init__(self, hardware: Hardware, used: Callable[[], float], how: str = "processor time") -> None:
        self.hardware, self._used = hardware, used
        self._began, self._start = time.monotonic(), used()
        self.about = f"{hardware.name}, {hardware.watts:g} W, {hardware.static:.0%} of it at rest, the rest by {how}"

    def joules(self) -> float:
        """Modelled from both clocks."""
        h, wall = self.hardware, time.monotonic() - self._began
        used = min(wall, self._used() - self._start)
        return h.watts * (h.static * wall + (1 - h.static) * max(0.0, used))


def process_use(cores: int) -> Callable[[], float]:
    """This process's processor time as a share of ``cores``."""
    return lambda: time.process_time() / cores


class Meter:
    """Reads a source from a thread of its own while it is open: ``with Meter(source) as meter: ...``. Afterwards the readings stay."""

    def __init__(self, source: Source, period: float = PERIOD) -> None:
        self.source, self.period = source, period
        self.times: list[float] = []
        self.joules: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presage-meter", daemon=True)

    def read(self) -> None:
        """Take a reading now."""
        self.joules.append(self.source.joules())
        self.times.append(time.monotonic())

    def _run(self) -> None:
        while not self._stop.wait(self.period):
            self.read()

    def __enter__(self) -> Meter:
        self.read()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.read()

    @property
    def seconds(self) -> float:
        """From the first reading to the last."""
        return self.times[-1] - self.times[0]

    @property
    def total(self) -> float:
        """Joules from the first reading to the last."""
        return self.joules[-1] - self.joules[0]


def idle_watts(source: Source, seconds: float = 1.0) -> float:
    """Mean draw while this process waits. Whatever else runs then counts as rest."""
    with Meter(source) as meter:
        time.sleep(seconds)
    return meter.total / meter.seconds


def attribute(times: Sequence[float], joules: Sequence[float], records: Sequence[Record]) -> Floats:
    """Joules of each request [n, 2], before its first token and after it: at any time those in flight share the draw equally.

    ``times``, ``joules``: readings. Failed requests get nothing. With no gap between requests the sum is what the meter saw.
    """
    found = np.zeros((len(records), 2))
    good = [i for i, r in enumerate(records) if r.ok]
    if not good or len(times) < 2:
        return found
    sent, first, done = (np.array([f(records[i]) for i in good]) for f in (lambda r: r.t_sched, lambda r: r.chunks[0], lambda r: r.t_done))
    edges = np.unique(np.clip(np.concatenate([sent, first, done]), times[0], times[-1]))
    spent = np.diff(np.interp(edges, times, joules))
    a, b = edges[:-1], edges[1:]
    here = (sent[:, None] <= a) & (done[:, None] >= b)
    share = here * (spent / np.maximum(1, here.sum(0)))
    before = b[None] <= first[:, None]
    found[good] = np.stack([(share * before).sum(1), (share * ~before).sum(1)], 1)
    return found


@dataclass
class Energy:
    """A run's energy. ``shares`` [n, 2] as ``attribute`` gives them; ``correct``: how many answers were right, None without a task."""

    source: str
    about: str
    joules: float
    seconds: float
    idle: float
    peak: float
    requests: int
    n_in: int
    n_out: int
    shares: Floats = field(repr=False)
    correct: int | None = None

    @classmethod
    def of(cls, meter: Meter, records: Sequence[Record], idle: float, correct: int | None = None) -> Energy:
        """From a closed meter and the requests it saw. Raises ConfigError if none of them succeeded."""
        done = [r for r in records if r.ok]
        if not done:
            raise ConfigError(f"no request succeeded: {next((r.error for r in records if r.error), 'there was none')}", param="task")
        draw = np.diff(meter.joules) / np.maximum(1e-9, np.diff(meter.times))
        source = meter.source
        tokens = sum(r.n_in for r in done), sum(r.n_out for r in done)
        shares = attribute(meter.times, meter.joules, records)
        return cls(source.name, source.about, meter.total, meter.seconds, idle, float(draw.max()), len(done), *tokens, shares, correct)

    @property
    def net(self) -> float:
        """Joules above the draw at rest."""
        return max(0.0, self.joules - self.idle * self.seconds)

    @property
    def watts(self) -> float:
        """Mean draw."""
        return self.joules / self.seconds

    @property
    def accuracy(self) -> float:
        """Share of right answers; nan without a task."""
        return float("nan") if self.correct is None else self.correct / self.requests

    def figures(self) -> list[tuple[str, float, str]]:
        """(name, value, unit) of everything worth printing; without a right answer a joule count per right answer is infinite."""
        prefill, decode = self.shares.sum(0)
        out = [
            ("energy", self.joules, "J"),
            ("energy above rest", self.net, "J"),
            ("mean power", self.watts, "W"),
            ("largest power", self.peak, "W"),
            ("power at rest", self.idle, "W"),
            ("per request", self.joules / self.requests, "J"),
            ("per request, above rest", self.net / self.requests, "J"),
            ("per output token", self.joules / max(1, self.n_out), "J"),
            ("per token in and out", self.joules / max(1, self.n_in + self.n_out), "J"),
            ("until first tokens, per prompt token", prefill / max(1, self.n_in), "J"),
            ("after first tokens, per later token", decode / max(1, self.n_out - self.requests), "J"),
        ]
        if self.correct is not None:
            out += [
                ("per correct answer", self.joules / self.correct if self.correct else float("inf"), "J"),
                ("accuracy", self.accuracy, ""),
                ("accuracy per watt (IPW)", self.accuracy / self.watts, "1/W"),
                ("accuracy per joule (IPJ)", self.accuracy / (self.joules / self.requests), "1/J"),
            ]
        return out

    def lines(self) -> list[str]:
        """The figures as text; every line says where its joules come from."""
        mark = self.source if self.source == "modelled" else f"measured, {self.source}"
        return [f"{name + ':':<40} {value:>12.4g} {unit:<4} ({mark})" for name, value, unit in self.figures()]

    def as_dict(self) -> dict[str, Any]:
        """As plain data; what is infinite or unknown is null."""
        found = {name.replace(",", "").replace(" ", "_"): value if np.isfinite(value) else None for name, value, _ in self.figures()}
        about = {"source": self.source, "about": self.about, "seconds": self.seconds, "requests": self.requests, "correct": self.correct}
        return about | {"tokens_in": self.n_in, "tokens_out": self.n_out} | found | {"joules_by_request": self.shares.sum(1).tolist()}


def open_source(
    wanted: str, model: Callable[[], Modelled], tries: Sequence[str] = ("rapl",), devices: Sequence[int] = (), say: Callable[[str], None] = print
) -> Source:
    """The source asked for, or for ``auto`` the first of ``tries`` that works; where a counter cannot be read, ``model`` and ``say`` why.

    Raises ConfigError for an unknown name.
    """
    makers: dict[str, Callable[[], Source]] = {"rapl": Rapl, "nvml": lambda: Nvml(devices), "modelled": model}
    if wanted != "auto" and wanted not in makers:
        raise ConfigError(f"unknown source {wanted!r}; known: auto, {', '.join(makers)}", param="source")
    for name in tries if wanted == "auto" else [wanted]:
        try:
            return makers[name]()
        except ConfigError as error:
            say(f"{name} cannot be used: {error.message}")
    say("so joules are modelled")
    return model()
