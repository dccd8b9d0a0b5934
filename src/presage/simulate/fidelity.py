"""How far the simulator is from an engine, beside how far the engine is from itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from presage.core.errors import ConfigError
from presage.core.protocols import LatencyModel
from presage.core.types import Finish, Floats
from presage.engine.replay import recorded
from presage.simulate.latency.fitted import steps_of_log
from presage.simulate.rerun import read_run
from presage.simulate.run import Result, simulate


def quantiles(off: Floats) -> dict[str, float]:
    """Median and 95th percentile of absolute relative differences."""
    return {"median": float(np.median(np.abs(off))), "p95": float(np.percentile(np.abs(off), 95))}


def errors(ours: Floats, theirs: Floats, tail: int) -> dict[str, float]:
    """Of simulated times over measured ones - 1: mean, median and percentile ``tail``; ``each``: median absolute error over requests."""
    return {
        "mean": float(ours.mean() / theirs.mean() - 1),
        "median": float(np.median(ours) / np.median(theirs) - 1),
        f"p{tail}": float(np.percentile(ours, tail) / np.percentile(theirs, tail) - 1),
        "each": float(np.median(np.abs(ours / theirs - 1))),
    }


def spread(folders: list[Path]) -> dict[str, float]:
    """Of a step's time, from run to run of one engine over the same steps. Raises ConfigError if the runs did not make the same steps."""
    runs = [steps_of_log(folder) for folder in folders]
    if any(len(f) != len(runs[0][0]) or (f != runs[0][0]).any() for f, _ in runs):
        raise ConfigError("these runs did not make the same steps", param="folders")
    pairs = [runs[i][1] / runs[j][1] - 1 for i in range(len(runs)) for j in range(len(runs)) if i != j]
    return quantiles(np.concatenate(pairs))


def step_errors(latency: LatencyModel, folders: list[Path]) -> dict[str, float]:
    """Of predicted step times against those of the runs; ``bias``: predicted total over measured total - 1."""
    found = [steps_of_log(folder) for folder in folders]
    features, seconds = np.concatenate([f for f, _ in found]), np.concatenate([s for _, s in found])
    told = latency.predict(features)[:, 0]
    return {**quantiles(told / seconds - 1), "bias": float(told.sum() / seconds.sum() - 1)}


def measured_requests(folder: str | Path) -> dict[str, tuple[float, float]]:
    """TTFT and E2E (s) of every request that ended well in a log, from its arrival; without the engine's own warm-up."""
    out: dict[str, tuple[float, float]] = {}
    for tag, body in recorded(folder)[1]:
        if tag == "i" and any(e[0] == "resetcache" for e in body[1]):
            out = {}
        if tag == "e" and body[2] == 0 and body[3] in (Finish.STOP, Finish.LENGTH):
            now, name, life = body[0], body[1], body[4]
            out[name] = (life[5] - life[3], now - life[3])
    return out


def simulated(folder: str | Path, latency: LatencyModel) -> Result:
    """A recorded run (level tokens) with modelled step times."""
    run = read_run(folder)
    if run.header["level"] != "tokens":
        raise ConfigError("at level shape all prompts look alike: record the run at level tokens", param="decision_log_level")
    return simulate(run.config, run.requests, run.target(latency))


def request_errors(folder: str | Path, latency: LatencyModel) -> dict[str, dict[str, float]]:
    """``errors`` of TTFT and E2E, with p95."""
    real, result = measured_requests(folder), simulated(folder, latency)
    at = {name: i for i, name in enumerate(result.ids) if name in real}
    order, out = [at[name] for name in real], {}
    for k, name in enumerate(("ttft", "e2e")):
        out[name] = errors(getattr(result, name)[order], np.array([r[k] for r in real.values()]), 95)
    return out
