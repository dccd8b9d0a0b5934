"""ServeGen (Alibaba): clients of a production service, each with its own rate, burstiness and lengths, window by window."""

from __future__ import annotations

import ast
import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from presage.bench.workloads.files import parsed, text
from presage.bench.workloads.table import Workload
from presage.core.errors import ConfigError

WINDOW = 600.0


@dataclass(frozen=True)
class Client:
    """``windows`` [w, 3]: start (s), rate (requests/s), shape; ``weibull`` [w] says whose shape. ``lengths``: from a second on, tables of
    (values, probabilities) of prompt and answer lengths."""

    name: str
    windows: np.ndarray
    weibull: np.ndarray
    lengths: tuple[tuple[float, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], ...]


def read_clients(folder: str | Path, service: str = "m-small") -> list[Client]:
    """The clients of a service (``m-small``, ``deepseek-r1``). Raises ConfigError."""
    root = Path(folder)
    roots = [p for p in (root, root / service, root / "servegen_clients" / service) if p.is_dir() and [*p.glob("chunk-*-trace.csv")]]
    if not roots:
        raise ConfigError(f"{root} has no ServeGen clients of {service}", param="dataset_path")
    return [_client(path) for path in sorted(roots[0].glob("chunk-*-trace.csv"), key=lambda p: int(p.name.split("-")[1]))]


def _client(path: Path) -> Client:
    name = path.name.removesuffix("-trace.csv")
    found = [parsed(path, i, lambda r=r: _window(r)) for i, r in enumerate(csv.reader(io.StringIO(text(path))), 1)]  # type: ignore[misc]
    data = next((p for p in (path.parent / f"{name}-dataset.json", path.parent / f"{name}-dataset.json.gz") if p.is_file()), None)
    if data is None or not found:
        raise ConfigError(f"{path} is empty or has no {name}-dataset.json beside it", param="dataset_path")
    tables = parsed(data, 1, lambda: json.loads(text(data)))
    lengths = [(float(t), parsed(data, 1, lambda row=row: (_law(row["input_tokens"]), _law(row["output_tokens"])))) for t, row in tables.items()]  # type: ignore[misc]
    known = tuple((t, law[0], law[1]) for t, law in sorted(lengths, key=lambda pair: pair[0]) if len(law[0][0]) and len(law[1][0]))
    if not known:
        raise ConfigError(f"{data} has no table of lengths", param="dataset_path")
    windows = np.array([w[:3] for w in found])
    return Client(name, windows, np.array([w[3] for w in found]), known)


def _window(row: list[str]) -> tuple[float, float, float, bool]:
    start, rate, _, family, shape, _ = row
    if family not in ("", "Gamma", "Weibull"):
        raise ValueError(f"unknown arrival family {family!r}")
    return float(start), float(rate) if family else 0.0, float(shape), family == "Weibull"


def _law(words: str) -> tuple[np.ndarray, np.ndarray]:
    """A printed dict length -> probability."""
    law = ast.literal_eval(words)
    p = np.array([*law.values()], float)
    return np.array([*law], np.int64), p / p.sum() if len(p) else p


def gaps(rng: np.random.Generator, n: int, rate: float, shape: float, weibull: bool) -> np.ndarray:
    """``n`` gaps of mean 1 / rate: a window's fitted scale is not its mean where the fit is poor, its measured rate is."""
    drawn = rng.weibull(shape, n) / math.gamma(1 + 1 / shape) if weibull else rng.gamma(shape, 1 / shape, n)
    return drawn / rate


def read_servegen(
    folder: str | Path, service: str = "m-small", start: float = 0.0, duration: float = 600.0, rate_scale: float = 1.0, seed: int = 0
) -> Workload:
    """Requests of all clients in ``duration`` s from second ``start`` of the recording; a tenant per client. Raises ConfigError."""
    clients = read_clients(folder, service)
    parts = [_requests(c, start, duration, rate_scale, np.random.default_rng([seed, i])) for i, c in enumerate(clients)]
    at, n_in, n_out = (np.concatenate([p[k] for p in parts]) for k in range(3))
    tenant = np.repeat(np.arange(len(clients)), [len(p[0]) for p in parts])
    if not len(at):
        raise ConfigError(f"no client of {service} sends anything from {start} s to {start + duration} s", param="dataset_path")
    order = np.argsort(at, kind="stable")
    return Workload(
        "servegen", at[order], np.maximum(1, n_in[order]), np.maximum(1, n_out[order]), tenant=tenant[order],
        tenants=tuple(c.name for c in clients),
    )  # fmt: skip


def _requests(
    client: Client, start: float, duration: float, scale: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    times = [np.empty(0)]
    for (begin, rate, shape), weibull in zip(client.windows.tolist(), client.weibull.tolist()):
        low, high = max(begin, start), min(begin + WINDOW, start + duration)
        if rate > 0 and shape > 0 and low < high:
            times.append(low - start + _within(rng, high - low, rate * scale, shape, weibull))
    at = np.concatenate(times)
    n_in, n_out = np.empty(len(at), np.int64), np.empty(len(at), np.int64)
    which = np.searchsorted([t for t, *_ in client.lengths], at + start, side="right") - 1
    for k in np.unique(np.maximum(0, which)).tolist():
        rows = np.flatnonzero(np.maximum(0, which) == k)
        _, law_in, law_out = client.lengths[k]
        n_in[rows], n_out[rows] = (rng.choice(values, len(rows), p=p) for values, p in (law_in, law_out))
    return at, n_in, n_out


def _within(rng: np.random.Generator, span: float, rate: float, shape: float, weibull: bool) -> np.ndarray:
    """Times in [0, span): gaps are drawn until they fill it."""
    at = np.empty(0)
    while not len(at) or at[-1] < span:
        last = at[-1] if len(at) else 0.0
        at = np.concatenate([at, last + np.cumsum(gaps(rng, int(rate * span) + 16, rate, shape, weibull))])
    return at[at < span]
