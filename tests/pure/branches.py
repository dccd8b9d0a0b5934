"""The exact law of an acceptance rule: run it over every outcome of its coins and draws, each weighted by its probability.

Rows, sampling state and rule are the real ones. Only the noise is replaced, by an object that takes both sides of every coin and every
value of every draw in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from presage.core.plan import Draft
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.execute.sampling import Rows, Sampler
from presage.verify.kit import Target, draft_of, plan_of, target_rows

Law = dict[tuple[int, ...], float]


class Branches:
    """Stands in for ``Noise``. ``script``: index taken at each choice; ``weight``: its probability."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self._odds: list[list[float]] = []

    def runs(self) -> Iterator[None]:
        """Yields once for every way the choices can fall."""
        while True:
            self._odds, self.weight = [], 1.0
            yield
            while self.script:
                odds = self._odds[len(self.script) - 1]
                later = [i for i in range(self.script[-1] + 1, len(odds)) if odds[i] > 0]
                if later:
                    self.script[-1] = later[0]
                    break
                self.script.pop()
            if not self.script:
                return

    def pick(self, odds: list[float]) -> int:
        """One index, with probability proportional to its odds."""
        if len(self._odds) == len(self.script):
            self.script.append(next(i for i, x in enumerate(odds) if x > 0))
        i = self.script[len(self._odds)]
        self._odds.append(odds)
        self.weight *= odds[i] / sum(odds)
        return i

    def uniform(self, span: int, depth: int, purpose: int = 1, index: int = 0) -> Coin:
        return Coin(self)

    def choose(self, weights: np.ndarray, span: int, depth: int, purpose: int = 2) -> int:
        return self.pick(weights.tolist())


class Coin:
    """A uniform number that is only ever compared: both answers are taken."""

    def __init__(self, branches: Branches) -> None:
        self.branches = branches

    def __lt__(self, p: float) -> bool:
        return self.branches.pick([p, 1.0 - p]) == 0


class BranchRows(Rows):
    """Draws take every id of the target. A row is the same in every branch, so it is made once."""

    seen: dict[tuple[int, int], Any]

    def probs(self, spans: Any, nodes: Any) -> Any:
        key = int(spans[0]), int(nodes[0])
        if key not in self.seen:
            self.seen[key] = super().probs(spans, nodes)
        return self.seen[key]

    def draw(self, spans: Any, nodes: Any, noise: Any) -> Any:
        return np.array([noise.pick(p.tolist()) for p in self.probs(spans, nodes)], np.int32)


class World:
    """One request with its sampling parameters and a target that depends on the last two ids."""

    def __init__(self, vocab: int, prompt: list[int], target: Target, **params: Any) -> None:
        self.vocab, self.prompt, self.target = vocab, prompt, cache(target)
        self._next: dict[tuple[int, ...], np.ndarray] = {}
        self.sampler = Sampler(vocab, [0])
        self.sampler.open(0, Request(id="w", prompt=np.array(prompt, np.int32), sampling=SamplingParams(max_tokens=50, **params)))

    def rows(self, draft: Draft) -> BranchRows:
        """The step's rows."""
        plan = plan_of([0], [len(self.prompt)], draft)
        logits, span, node = target_rows(plan, [self.prompt], [self.target])
        rows = BranchRows(logits, plan, (span, node), self.sampler, self.sampler.steps, None)
        rows.seen = {}
        return rows

    def next_probs(self, path: tuple[int, ...]) -> np.ndarray:
        """The target after a path: what the ordinary sampler would draw from."""
        if path not in self._next:
            rows = self.rows(draft_of([[(t, i - 1) for i, t in enumerate(path)]]))
            self._next[path] = rows.probs(np.zeros(1, np.int32), np.array([len(path) - 1], np.int32))[0]
        return self._next[path]

    def target_law(self, length: int) -> Law:
        """Probability of every sequence of that length."""
        law: Law = {(): 1.0}
        for _ in range(length):
            law = {(*s, t): w * p for s, w in law.items() for t, p in enumerate(self.next_probs(s).tolist()) if p > 0}
        return law

    def law(self, rule: Any, drafts: list[tuple[float, Draft]], length: int) -> Law:
        """Probability of the first ``length`` ids: a round over each (weight, draft), then the target's own continuation."""
        emitted: Law = {}
        for weight, draft in drafts:
            branches, rows = Branches(), self.rows(draft)
            for _ in branches.runs():
                verdict = rule.judge(rows, draft, branches)
                ids = tuple(verdict.ids.tolist())
                emitted[ids] = emitted.get(ids, 0.0) + weight * branches.weight
        out: Law = {}
        for ids, w in emitted.items():
            spread = {ids: w}
            while len(next(iter(spread))) < length:
                spread = {(*s, t): x * p for s, x in spread.items() for t, p in enumerate(self.next_probs(s).tolist()) if p > 0}
            for s, x in spread.items():
                out[s[:length]] = out.get(s[:length], 0.0) + x
        return out

    def accepted(self, rule: Any, drafts: list[tuple[float, Draft]]) -> float:
        """Expected number of accepted drafts."""
        total = 0.0
        for weight, draft in drafts:
            branches, rows = Branches(), self.rows(draft)
            for _ in branches.runs():
                total += weight * len(rule.judge(rows, draft, branches).path) * branches.weight
        return total


def cache(target: Target) -> Target:
    """The same target, each row made once (it depends on the last two ids)."""
    made: dict[tuple[int, ...], Any] = {}

    def row(ids: list[int]) -> Any:
        key = tuple(ids[-2:])
        if key not in made:
            made[key] = target(ids)
        return made[key]

    return row


def distance(a: Law, b: Law) -> float:
    """Largest difference of any probability."""
    return max(abs(a.get(s, 0.0) - b.get(s, 0.0)) for s in a.keys() | b.keys())


Proposal = Callable[[tuple[int, ...]], np.ndarray]


class Trials:
    """Collects the proposals of one draft: equal draws after the same path share a node and stay separate trials."""

    def __init__(self) -> None:
        self.tree: list[tuple[int, int]] = []
        self.nodes: list[int] = []
        self.rows: list[int] = []
        self.q: list[np.ndarray] = []

    def row(self, q: np.ndarray) -> int:
        """The index of a new row of ``q``."""
        self.q.append(q)
        return len(self.q) - 1

    def add(self, token: int, parent: int, row: int) -> int:
        """A proposal below ``parent``; its node."""
        if (token, parent) not in self.tree:
            self.tree.append((token, parent))
        self.nodes.append(self.tree.index((token, parent)))
        self.rows.append(row)
        return self.nodes[-1]

    def draft(self) -> Draft:
        """The draft of one span."""
        out = draft_of([self.tree])
        out.trial_node, out.trial_q = np.array(self.nodes, np.int32), np.array(self.rows, np.int32)
        out.q = np.stack(self.q) if self.q else None
        return out


def all_drafts(make: Callable[[Branches, Trials], None]) -> list[tuple[float, Draft]]:
    """(probability, draft) for every way in which ``make`` can draw."""
    out, branches = [], Branches()
    for _ in branches.runs():
        trials = Trials()
        make(branches, trials)
        out.append((branches.weight, trials.draft()))
    return out
