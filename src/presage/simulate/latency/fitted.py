"""A step's time as a non-negative combination of what the step holds, fitted to measured steps of one engine on one machine.

Terms never have negative weights, so more work never takes less time, also outside the measured range. A line in the number of rows is
too stiff (weights are read once whatever the rows, then compute takes over), so rows enter through hinges: a convex piecewise line.
Least squares of *relative* errors: a decode step of 5 ms matters as much as a prefill step of 500.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import Draft, Facts, StepPlan
from presage.core.types import EMPTY, Floats
from presage.engine.replay import read_frames
from presage.simulate.executor import step_features

FORMAT = 1
KNOTS = (4, 16, 64, 256, 1024)
"""Rows at which the slope may rise."""
TERMS = ("step", "spans", "logits", "keys", "pairs", "drafts", "moves", "rows", *(f"rows>{k}" for k in KNOTS))


def terms(f: Floats) -> Floats:
    """Features [m, 12] to terms [m, len(TERMS)]. Rows and attention count by their share of the layers."""
    share = f[:, 8]
    rows = f[:, 0] * share
    plain = [np.ones(len(f)), f[:, 1], f[:, 5], f[:, 6] * share, f[:, 7] * share, f[:, 4], f[:, 10], rows]
    return np.stack(plain + [np.maximum(0.0, rows - k) for k in KNOTS], axis=1)


def nnls(a: Floats, b: Floats, rounds: int = 300) -> Floats:
    """Non-negative x that minimises |a x - b| (Lawson and Hanson's active set, 1974)."""
    n = a.shape[1]
    x, free = np.zeros(n), np.zeros(n, bool)
    for _ in range(rounds):
        pull = a.T @ (b - a @ x)
        pull[free] = -np.inf
        best = int(np.argmax(pull))
        if free.all() or pull[best] <= 1e-10 * max(1.0, float(np.abs(b).max())):
            break
        free[best] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (trial[free] > 0).all():
                x = trial
                break
            # Walk towards the trial until the first weight reaches zero, and bind that one.
            low = free & (trial <= 0)
            step = np.min(x[low] / np.maximum(x[low] - trial[low], 1e-300))
            x = x + step * (trial - x)
            free &= x > 1e-15
            x[~free] = 0.0
            if not free.any():
                break
    return np.asarray(x)


@dataclass
class Fitted:
    """Implements ``core.protocols.LatencyModel``. ``weights`` [TERMS] seconds per unit, ``power`` = (idle watts, watts of a running step).

    ``about``: what it was fitted on (model, machine, engine, samples, errors); a report should print it.
    """

    weights: Floats
    power: tuple[float, float] = (0.0, 0.0)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Name of the model and what it was fitted on."""
        return "fitted on " + json.dumps(self.about, sort_keys=True)

    def predict(self, features: Floats) -> Floats:
        """(seconds, joules) [m, 2], seconds rounded to a microsecond."""
        # Summed term by term in fixed order: BLAS may answer other bits for another number of rows, and replays compare them.
        found = terms(features)
        seconds = np.zeros(len(features))
        for j, weight in enumerate(self.weights.tolist()):
            seconds += found[:, j] * weight
        seconds = np.maximum(1e-6, np.round(seconds + features[:, 11], 6))
        return np.stack([seconds, seconds * self.power[1]], axis=1)

    def observe(self, facts: Facts) -> None:
        """Fitted once, from a profile: decisions must not depend on when a step was observed."""

    def errors(self, features: Floats, seconds: Floats) -> dict[str, float]:
        """Relative step-time errors: median, 95th percentile, bias."""
        off = self.predict(features)[:, 0] / seconds - 1
        return {
            "median": float(np.median(np.abs(off))),
            "p95": float(np.percentile(np.abs(off), 95)),
            "bias": float(seconds @ (off + 1) / seconds.sum() - 1),
        }

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        body = {"format": FORMAT, "terms": list(TERMS), "weights": self.weights.tolist(), "power": list(self.power), "about": self.about}
        Path(path).write_text(json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Fitted:
        """Read what ``save`` wrote. Raises ConfigError for another format or other terms."""
        try:
            body = json.loads(Path(path).read_text())
            if body["format"] != FORMAT or body["terms"] != list(TERMS):
                raise ConfigError(f"{path} was fitted with other terms (format {body['format']}); fit it again", param="latency")
            return cls(np.array(body["weights"]), (body["power"][0], body["power"][1]), body["about"])
        except (json.JSONDecodeError, KeyError) as error:
            raise ConfigError(f"{path} is not a fitted latency model: {error!r}", param="latency") from None


def fit(features: Floats, seconds: Floats, *, power: tuple[float, float] = (0.0, 0.0), about: dict[str, Any] | None = None) -> Fitted:
    """Weights for measured steps: ``features`` [n, 12], ``seconds`` [n]. Raises ConfigError below 16 steps.

    Errors count relative to what the last round predicted: relative to what was measured, slow outliers would count for nothing and the
    fit would come out too fast. Steps above 5 times the prediction (a pause of the machine, a compilation) are left out.
    """
    if len(seconds) < 16:
        raise ConfigError(f"a fit needs at least 16 measured steps, got {len(seconds)}", param="latency")
    keep, scale = seconds > 0, seconds
    found = terms(features)
    model = Fitted(np.zeros(len(TERMS)), power)
    for _ in range(4):
        a = found[keep] / scale[keep, None]
        size = np.maximum(a.max(0), 1e-300)
        # Columns of one size, or the stopping rule would mean something else for each of them.
        model = Fitted(nnls(a / size, seconds[keep] / scale[keep]) / size, power)
        scale = model.predict(features)[:, 0]
        keep = (seconds > 0) & (seconds < 5 * scale)
    model.about = {**(about or {}), "steps": len(seconds), "left_out": int(len(seconds) - keep.sum()), **model.errors(features[keep], seconds[keep])}
    return model


def steps_of_log(folder: str | Path, warm_up: bool = False) -> tuple[Floats, Floats]:
    """Features [n, 12] and seconds [n] of every finished step in a decision log (any level), without those of the engine's own warm-up.

    A step lasts from the turn that launched it to the turn that took its result in, the host's share included: so the steps of a busy
    engine add up to its wall time, and a simulated step is what a request waits for.
    """
    plans: dict[int, StepPlan] = {}
    begun: dict[int, float] = {}
    rows: list[np.ndarray] = []
    times: list[float] = []
    layers = 1
    for tag, body in read_frames(folder):
        if tag == "h":
            layers = body["layers"]
        elif tag == "d":
            plans[body[0]] = _plan(body)
        elif tag == "i":
            now, events = body[0], body[1]
            for plan in [e[1] for e in events if e[0] == "done" and e[1] in begun]:
                rows.append(step_features(plans.pop(plan), layers))
                times.append(now - begun.pop(plan))
            begun.update((plan, now) for plan in plans if plan not in begun)
            if not warm_up and any(e[0] == "resetcache" for e in events):
                rows, times, warm_up = [], [], True
    return np.array(rows).reshape(-1, 12), np.array(times)


def _plan(body: list[Any]) -> StepPlan:
    """As much of a logged plan as its features need."""
    slot, start, count, nodes, layer0, layer1 = np.frombuffer(body[2], np.int32).reshape(6, -1)
    rows = np.concatenate([[0], np.cumsum(count + nodes)]).astype(np.int32)
    where: dict[str, Any] = {"slot": slot, "start": start, "count": count, "nodes": nodes, "layer0": layer0, "layer1": layer1, "rows": rows}
    want = np.frombuffer(body[3], np.uint8)
    return StepPlan(
        id=body[0], lane=body[1], want=want, ids=EMPTY, position=EMPTY, index=EMPTY, tables=(), draft=Draft.none(len(slot)), **where
    )  # fmt: skip
