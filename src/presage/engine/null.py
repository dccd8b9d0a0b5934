"""An executor without a model: answers every plan at once with ids from a rule. It measures the loop and drives its property tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from presage.core.events import Event
from presage.core.kv import KVGeometry, KVGroup
from presage.core.plan import StepDone, StepFault, StepPlan
from presage.core.protocols import Companion
from presage.core.types import Want

Rule = Callable[[int, int], int]


def null_geometry(blocks: int, block_tokens: int = 32, windows: tuple[int, ...] = (0,)) -> KVGeometry:
    """A geometry with one group per entry of ``windows`` (0 = full attention) and ``blocks`` blocks in each pool."""
    groups = tuple(
        KVGroup(layers=((i, 0),), heads=1, head_dim=16, block_bytes=1024, block_tokens=block_tokens, window=w) for i, w in enumerate(windows)
    )
    return KVGeometry(groups=groups, num_blocks=(blocks,) * len(groups))


class NullExecutor:
    """``rule(slot, position) -> id`` decides what is sampled; draft nodes are accepted while they equal it.

    ``manual`` keeps plans in ``submitted`` until ``finish`` is called, so that tests choose when results arrive.
    """

    def __init__(self, geometry: KVGeometry, layers: int = 4, depth: int = 1, rule: Rule | None = None, manual: bool = False) -> None:
        self.geometry, self.layers, self.depth, self.manual = geometry, layers, depth, manual
        self.rule = rule or (lambda slot, position: 7)
        self.constant = rule is None
        self.submitted: list[StepPlan] = []
        self.now: Callable[[], float] = lambda: 0.0
        self.post: Callable[[Event], None] = self._keep
        self.events: list[Event] = []
        self.fail: set[int] = set()

    def _keep(self, event: Event) -> None:
        self.events.append(event)

    def start(self, post: Callable[[Event], None]) -> None:
        """Results go to ``post`` from now on."""
        self.post = post

    def submit(self, plan: StepPlan) -> None:
        """Answer now, or keep the plan if ``manual``."""
        self.submitted.append(plan)
        if not self.manual:
            self.finish()

    def finish(self) -> None:
        """Answer the oldest submitted plan."""
        plan = self.submitted.pop(0)
        if plan.id in self.fail:
            self.post(StepFault(plan.id, "injected fault", plan.slot))
            return
        sampling = (plan.want & int(Want.SAMPLE)) > 0
        t = self.now()
        if self.constant and not len(plan.draft):
            off = np.zeros(len(sampling) + 1, np.int32)
            np.cumsum(sampling, out=off[1:])
            self.post(StepDone(plan.id, t, t, off, np.full(int(off[-1]), 7, np.int32)))
            return
        self.post(self._judge(plan, sampling, t))

    def _judge(self, plan: StepPlan, sampling: np.ndarray, t: float) -> StepDone:
        new: list[int] = []
        path: list[int] = []
        off, path_off = [0], [0]
        for s, wanted in enumerate(sampling.tolist()):
            if wanted:
                self._span(plan, s, new, path)
            off.append(len(new))
            path_off.append(len(path))
        a, b, c, d = (np.array(x, np.int32) for x in (off, new, path_off, path))
        return StepDone(plan.id, t, t, a, b, c, d)

    def _span(self, plan: StepPlan, s: int, new: list[int], path: list[int]) -> None:
        d, first = plan.draft, int(plan.draft.offset[s]) if len(plan.draft) else 0
        at, node = int(plan.start[s] + plan.count[s]), -1
        while True:
            token = self.rule(int(plan.slot[s]), at)
            new.append(token)
            nodes = range(int(plan.nodes[s]))
            match = [j for j in nodes if d.parent[first + j] == node and d.token[first + j] == token]
            if not match:
                return
            node = match[0]
            path.append(node)
            at += 1

    def cut(self) -> None:
        """No bursts."""

    def companions(self) -> tuple[Companion, ...]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing to close."""
