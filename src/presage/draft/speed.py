"""Pipelined drafting through the target's own layers (Hooper et al., "SPEED", NeurIPS 2023 ENLSP): the next token starts from an early guess.

The stack is cut into passes of ``stride`` layers. In one tick every token in flight runs its next pass; after it, the head reads a guess of the
successor off the token's state. The successor starts at the bottom with the first guess and is dropped, with everything after it,
as soon as a later pass of its parent changes the guess. So guesses ripen while later tokens are already under way, where early exit guesses once.

The verification step runs the tokens through the whole stack again: tokens that are right cost their early layers twice. With cyclically shared
weights (the paper's case) a tick reads one block of weights; here each pass is a leg of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import Draft, Grants, Moves, StepDone, StepPlan
from presage.core.protocols import EngineView
from presage.core.types import Ints, Singles, Want
from presage.draft.early_exit import EarlyExitDrafter
from presage.draft.lanes import Lanes
from presage.draft.passes import held
from presage.draft.sources import sources
from presage.execute.propose import Ask, Proposed


class SpeedDrafter(EarlyExitDrafter):
    """``stride``: layers of a pass (a quarter of the stack by default); ``num_speculative_tokens``: most tokens in flight behind the last
    known one, at most one less than there are passes. Raises ConfigError for settings out of range.

    Under rejection-type rules guesses are the likeliest tokens, judged as point masses. Penalties count known tokens only, none in flight.
    """

    source = "speed"

    def __init__(self, num_speculative_tokens: int | None = None, stride: int | None = None, *, lanes: Lanes) -> None:
        depth = len(lanes.target.layers)
        stride = max(1, depth // 4) if stride is None else stride
        if not 0 < stride < depth:
            raise ConfigError(f"stride must be between 1 and {depth - 1}, got {stride}", param="stride")
        self.ends = (*range(0, depth, stride), depth)  # arrays of a drafter are columns by slot
        most = len(self.ends) - 2
        super().__init__(most if num_speculative_tokens is None else min(num_speculative_tokens, most), stride, lanes=lanes)
        self.ask = Ask(draws="mode" if self.ask.draws else "")

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """Yields one pass per tick, for all tokens in flight of all grants."""
        table = view.table
        known, budget, limit, moves = self._budgets(view, grants)
        pipes, epoch = Pipes(np.minimum(budget, limit), len(self.ends) - 1), table.epoch[grants.slot].copy()
        pipes.token[:, 0] = self.tokens.data[self.start[grants.slot] + np.maximum(known, 1) - 1]
        for tick in range(pipes.ticks):
            grant, place = pipes.due()
            if not len(grant):
                break
            ask = replace(self.ask, fresh=tick == 0)
            plan = self._tick(pipes, grants.slot, known, grant, place, ask, tick < pipes.ticks - 1, moves)
            done = yield plan
            moves = Moves()
            pipes.alive &= held(table, grants.slot, epoch)
            pipes.take(grant, place, done.exports["proposed"][0])
        return pipes.draft(self.source)

    def _tick(
        self, pipes: Pipes, slots: Ints, known: Ints, grant: Ints, place: Ints, ask: Ask, more: bool, moves: Moves
    ) -> StepPlan:  # fmt: skip
        """One span per token in flight: its next pass."""
        n, at = len(grant), known[grant] - 1 + place
        one = np.ones(n, np.int32)
        # The last tick's states wait for nobody.
        want = np.full(n, int(Want.TOPK | Want.HIDDEN) if more else int(Want.TOPK), np.uint8)
        rows = np.arange(n + 1, dtype=np.int32)
        plan = self._plan(slots[grant], at, one, 0 * one, want, rows, pipes.token[grant, place], at, at, Draft.none(n), None, moves)
        ends, done = np.array(self.ends, np.int32), pipes.passes[grant, place]
        plan.layer0, plan.layer1, plan.work = ends[done], ends[done + 1], (ask,)
        return plan


class Pipes:
    """Tokens in flight of ``budget`` [G] grants: place 0 is the last known token, place j its j-th successor.

    ``passes`` [G, P]: passes that the token has run; ``count`` [G]: successors in flight; ``prob`` [G, P]: the newest guess's probability.
    """

    def __init__(self, budget: Ints, passes: int) -> None:
        shape = len(budget), passes + 1
        self.budget, self.ticks = budget, passes - 1
        self.token, self.passes = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.prob: Singles = np.zeros(shape, np.float32)
        self.count = np.zeros(len(budget), np.int32)
        self.alive = budget > 0

    def due(self) -> tuple[Ints, Ints]:
        """(grant, place) of the tokens that run in the next tick: those whose guesses matter and that have early passes left."""
        place = np.arange(self.token.shape[1])
        some = (place <= self.count[:, None]) & (place < self.budget[:, None]) & (self.passes < self.ticks) & self.alive[:, None]
        grant, place = np.nonzero(some)
        return grant.astype(np.int32), place.astype(np.int32)

    def take(self, grant: Ints, place: Ints, got: Proposed) -> None:
        """Guesses [n] after a tick, oldest token first: a new guess starts a successor and drops those in flight behind it."""
        self.passes[grant, place] += 1
        flipped = np.zeros(len(self.budget), np.bool_)
        for g, j, token, prob in zip(grant.tolist(), place.tolist(), got.ids[:, 0].tolist(), got.prob[:, 0].tolist(), strict=True):
            if flipped[g]:
                continue
            self.prob[g, j + 1] = prob
            if token < 0 or j + 1 > self.count[g] or self.token[g, j + 1] != token:
                flipped[g] = True
                self.count[g] = j + (token >= 0)
                self.token[g, j + 1], self.passes[g, j + 1] = token, 0

    def draft(self, source: str) -> Draft:
        """The successors as chains."""
        count = np.where(self.alive, self.count, 0)
        out = Draft.chains([row[1 : n + 1] for row, n in zip(self.token.tolist(), count.tolist(), strict=True)])
        path = np.minimum(np.cumprod(self.prob[:, 1:], axis=1), 1.0)
        out.prob = path[np.arange(path.shape[1]) < count[:, None]].astype(np.float32)
        out.source = sources(len(out), source)
        return out
