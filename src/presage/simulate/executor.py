"""An executor that computes nothing: a latency model says when a step ends and what it costs, an oracle what it decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from presage.core.kv import KVGeometry
from presage.core.plan import StepDone, StepPlan
from presage.core.protocols import Companion, LatencyModel
from presage.engine.kernels import mark


def step_features(plan: StepPlan, layers: int) -> np.ndarray:
    """Features [12] of a plan from its spans alone, by the engine's own kernel (for passes and logs that carry none)."""
    n = len(plan.slot)
    at, zeros = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    out = np.zeros(12)
    mark(
        at, plan.start, plan.count, plan.nodes, plan.layer0, plan.layer1, layers, plan.want, zeros.astype(np.uint8), zeros, zeros.copy(), out
    )  # fmt: skip
    out[10] = len(plan.moves)
    return out


class ModelledExecutor:
    """Implements ``core.protocols.Executor``. ``wake(t)`` of the driver is called with the end of each step; ``finish`` then gives the result.

    Steps run one after another on one device: a step submitted early starts when the one before it ends (``depth`` > 1).
    Verdicts are asked for at the end of a step, so that a burst can still move a step that is running (``coalesce``).
    """

    def __init__(self, latency: LatencyModel, oracle: Any, geometry: KVGeometry, layers: int, depth: int = 1) -> None:
        self.latency, self.oracle, self.geometry, self.layers, self.depth = latency, oracle, geometry, layers, depth
        self.now = self.free_at = 0.0
        self.flight: deque[list[Any]] = deque()
        self.wake: Callable[[float], None] = lambda at: None
        self.on_step: Callable[[StepPlan, float, float, float, int], None] = lambda plan, t0, t1, joules, repeat: None

    def start(self, post: Callable[[Any], None]) -> None:
        """The virtual driver fetches results by ``finish``: a result posted now would come from the future."""

    def submit(self, plan: StepPlan) -> None:
        """Price the step; it ends at a known time."""
        if not plan.features[1]:
            plan.features = step_features(plan, self.layers)
        seconds, joules = self.latency.predict(plan.features[None])[0].tolist()
        t0 = max(self.now, self.free_at)
        self.free_at = t0 + seconds
        self.flight.append([plan, t0, self.free_at, joules])
        self.wake(self.free_at)

    def finish(self) -> StepDone:
        """The result of the oldest step."""
        plan, t0, t1, joules = self.flight.popleft()
        v = self.oracle.judge(plan)
        self.on_step(plan, t0, t1, joules, 1)
        return StepDone(plan.id, t0, t1, v.off, v.ids, v.path_off, v.path, joules=joules)

    def cut(self) -> None:
        """A burst is cut before it begins: see ``coalesce``."""

    def companions(self) -> tuple[Companion, ...]:
        """The oracle follows who sits where."""
        return (self.oracle,)

    def close(self) -> None:
        """Nothing to close."""
