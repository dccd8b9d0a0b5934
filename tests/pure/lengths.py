"""A small world for draft length policies: requests whose acceptance is known, a machine whose step time is known, and the policy in between.

It calls a policy exactly as the loop does (ask, plan, draft, select, run, observe) but draws acceptance instead of running a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from presage.core.plan import Draft, Facts, Grants, NewIds, StepDone, StepPlan
from presage.core.protocols import EngineView
from presage.core.table import Table
from presage.core.types import EMPTY
from presage.draft.length.scan import step_features
from presage.draft.prune import keep_nodes

LAYERS = 4


def stairs(base: float = 4e-3, tile: int = 16, per_tile: float = 1.5e-3, free_rows: int = 32) -> Callable[[np.ndarray], np.ndarray]:
    """Seconds from features [m, 12]: flat up to ``free_rows`` (memory bound), then a step per tile."""

    def seconds(f: np.ndarray) -> np.ndarray:
        tiles = np.ceil(f[:, 0] / tile) - free_rows / tile
        return np.asarray(base + per_tile * np.maximum(tiles, 0.0) + 1e-9 * f[:, 6])

    return seconds


class Known:
    """A latency model that is right."""

    def __init__(self, seconds: Callable[[np.ndarray], np.ndarray]) -> None:
        self.seconds = seconds

    def predict(self, features: np.ndarray) -> np.ndarray:
        t = np.round(self.seconds(features), 6)
        return np.stack([t, 0 * t], 1)

    def observe(self, facts: Facts) -> None:
        """Knows already."""


class Plenty:
    """A ledger that never runs out."""

    free = np.array([1 << 30])

    def need(self, slots: np.ndarray, upto: np.ndarray) -> np.ndarray:
        return np.zeros((len(slots), 1), np.int64)


def view_of(batch: int, known: int = 400, latency: Any = None) -> EngineView:
    """A view of ``batch`` decoding requests in slots 0.., each with ``known`` tokens."""
    view = EngineView()
    view.table = Table(max(batch, 8))
    for seq in range(batch):
        view.table.seq[view.table.take()] = seq
    c = view.table.capacity
    view.known = np.full(c, known, np.int32)
    view.computed, view.gap = view.known - 1, np.ones(c, np.int32)
    view.ready, view.queue = np.arange(batch, dtype=np.int32), EMPTY
    view.ledger, view.free, view.layers, view.step, view.latency, view.now = Plenty(), Plenty.free, LAYERS, 0, latency, 0.0  # type: ignore[assignment]
    return view


def facts_of(grants: Grants, draft: Draft, start: np.ndarray, path_off: np.ndarray, path: np.ndarray, t0: float, t1: float, step: int = 0) -> Facts:
    """The facts of a step that accepted ``path``."""
    n, nodes = len(grants), np.diff(draft.offset).astype(np.int32)
    rows = np.zeros(n + 1, np.int32)
    np.cumsum(grants.tokens + nodes, out=rows[1:])
    new_off = np.zeros(n + 1, np.int32)
    np.cumsum(1 + np.diff(path_off), out=new_off[1:])
    ids = np.zeros(int(new_off[-1]), np.int32)
    want = np.ones(n, np.uint8)
    plan = StepPlan(
        step, 0, grants.slot, start, grants.tokens, nodes, grants.layer0, grants.layer1, want, rows, EMPTY, EMPTY, EMPTY, (), draft,
        features=features_of(grants, nodes, start),
    )  # fmt: skip
    done = StepDone(step, t0, t1, new_off, ids, path_off, path)
    return Facts(plan, grants, draft, done, NewIds(grants.slot, new_off, ids, np.zeros(n, np.uint8)))


def features_of(grants: Grants, nodes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What ``engine.kernels.mark`` would say of the step."""
    f = np.empty(12)
    rows = grants.tokens + nodes
    step_features(start, grants.tokens, np.ones(len(grants), np.bool_), 1.0, f)
    f[0], f[4], f[5] = rows.sum(), nodes.sum(), len(rows) + nodes.sum()
    f[6], f[7] = (start + rows).sum(), (rows * (start + rows)).sum()
    return f


class World:
    """``batch`` requests at all times, each ``life`` tokens long, taking turns through the acceptance rates ``alphas``.

    What the drafter would get right is fixed by request and position, so all policies are compared on the same texts. Drafts are chains. A node's
    chance varies around the request's rate; the drafter claims its square root (too much, but in the right order). ``drafting``
    seconds are spent per step that drafts, and ``level`` more per level of the longest draft.
    """

    def __init__(
        self,
        policy: Any,
        batch: int,
        seconds: Callable[[np.ndarray], np.ndarray],
        *,
        seed: int = 0,
        alphas: tuple[float, ...] = (0.2, 0.8, 0.5, 0.95),
        hint: int = 12,
        noise: float = 0.02,
        drafting: float = 0.0,
        level: float = 0.0,
        life: int = 160,
        latency: Any = None,
    ) -> None:
        self.policy, self.seconds, self.noise, self.drafting, self.level, self.life = policy, seconds, noise, drafting, level, life
        self.rng = np.random.default_rng(seed)
        self.view, self.alphas = view_of(batch, latency=latency), alphas
        self.hint = np.full(self.view.table.capacity, hint, np.int32)
        self.chance, self.right, self.claim = (np.zeros((batch, life + hint + 1)) for _ in range(3))
        self.at = np.zeros(batch, np.int64)
        self.seq = 0
        for i in range(batch):
            self._arrive(i)
            self.at[i] = i * life // batch  # requests end one by one, not all at once
        self.now, self.tokens = 0.0, 0
        self.asked, self.drafted, self.accepted, self.steps = 0, 0, 0, 0

    def run(self, tokens: int, warm: int = 0) -> float:
        """Tokens per second while ``tokens`` are emitted after ``warm`` ones."""
        while self.tokens < warm:
            self.step()
        t, n = self.now, self.tokens
        while self.tokens < n + tokens:
            self.step()
        return (self.tokens - n) / (self.now - t)

    def step(self) -> Facts:
        """One turn."""
        view, batch = self.view, len(self.at)
        ask = self.policy.ask(view, self.hint)
        grants = Grants.of(view.ready, np.ones(batch, np.int32), LAYERS, draft=ask[view.ready])
        draft, right = Draft.none(batch), np.empty(0)
        if ask.any():
            self.asked += 1
            self.now += self.drafting + self.level * int(ask.max())
            draft, right = self._draft(grants)
            keep = self.policy.select(view, grants, draft)
            assert not keep.hold.any()
            draft, right = keep_nodes(draft, keep.node, ~keep.hold), right[keep.node]
        facts = self._run(grants, draft, right)
        self.policy.observe(facts)
        view.step += 1
        self._age(np.diff(facts.done.new_off))
        return facts

    def _draft(self, grants: Grants) -> tuple[Draft, np.ndarray]:
        counts = grants.draft
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        owner = np.repeat(np.arange(len(counts)), counts)
        place = (np.arange(offset[-1]) - offset[owner]).astype(np.int32)
        where = self.at[owner] + place
        total = np.cumsum(np.log(self.claim[owner, where]))
        prob = np.exp(total - np.concatenate([[0.0], total])[offset[owner]]).astype(np.float32)
        return Draft(offset, place, place - 1, place + 1, prob), self.right[owner, where]

    def _run(self, grants: Grants, draft: Draft, right: np.ndarray) -> Facts:
        owner = np.repeat(np.arange(len(grants)), np.diff(draft.offset))
        missed = np.concatenate([[0.0], np.cumsum(1.0 - right)])
        lengths = np.bincount(owner, missed[1:] == missed[draft.offset[:-1]][owner], len(grants)).astype(np.int32)
        path_off = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        path = (np.arange(path_off[-1]) - np.repeat(path_off[:-1], lengths)).astype(np.int32)
        facts = facts_of(grants, draft, self.view.computed[grants.slot], path_off, path, self.now, self.now)
        took = float(self.seconds(facts.plan.features[None])[0]) * float(np.exp(self.rng.normal(0.0, self.noise)))
        facts.done.t1 = self.now = self.now + took
        self.drafted, self.accepted, self.steps = self.drafted + len(draft), self.accepted + len(path), self.steps + 1
        return facts

    def _age(self, emitted: np.ndarray) -> None:
        self.tokens += int(emitted.sum())
        self.at += emitted
        for i in np.flatnonzero(self.at >= self.life).tolist():
            self._arrive(i)

    def _arrive(self, i: int) -> None:
        rng = np.random.default_rng(self.seq)
        alpha = self.alphas[self.seq % len(self.alphas)]
        odds = alpha / (1 - alpha) * np.exp(rng.normal(0.0, 1.0, self.chance.shape[1]))
        self.chance[i] = odds / (1 + odds)
        self.claim[i] = np.sqrt(self.chance[i])
        self.right[i] = rng.random(self.chance.shape[1]) < self.chance[i]
        self.view.table.seq[i], self.at[i], self.seq = self.seq, 0, self.seq + 1
