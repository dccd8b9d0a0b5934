"""What drafters with forward passes have in common: the passes of a whole batch, level by level, on KV that they keep in step.

The first pass computes what the lane lacks of the known tokens, and its last rows propose the first level; each later pass computes one level of
every request's tree. Long gaps (a new prompt) are computed over several steps, a chunk in each, beside the requests that draft already.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import BlockTable, Draft, Grants, Moves, StepDone, StepPlan
from presage.core.protocols import EngineView, KVCache
from presage.core.table import Table
from presage.core.types import Ints, State, Want
from presage.draft.grow import Trees
from presage.draft.host import HostDrafter
from presage.draft.lanes import Lane
from presage.draft.length.wishes import binding
from presage.execute.propose import Ask

_RUNNING, _TOPK, _NONE = int(State.RUNNING), int(Want.TOPK), int(Want.NONE)


class PassDrafter(HostDrafter):
    """Ids and caps by slot are a host drafter's. ``num_speculative_tokens``: most nodes of a draft. ``tree_width``: children of a node, and
    nodes of a level that are expanded (1 = a chain); ``tree_depth``: most levels, one pass each; ``min_prob``: paths less likely are not expanded.

    Under a rejection-type rule tokens are drawn and their rows recorded; else they are the likeliest under the target's own noise.
    Raises ConfigError for settings out of range.
    """

    host = False
    source = "other"

    def __init__(self, lane: Lane, num_speculative_tokens: int, tree_width: int, tree_depth: int | None, min_prob: float) -> None:
        super().__init__(num_speculative_tokens)
        if tree_width < 1 or (tree_depth is not None and tree_depth < 1):
            raise ConfigError("tree_width and tree_depth must be at least 1", param="tree_width" if tree_width < 1 else "tree_depth")
        if not 0.0 <= min_prob < 1.0:
            raise ConfigError(f"min_prob must be at least 0 and below 1, got {min_prob}", param="min_prob")
        self.lane, self.min_prob = lane, min_prob
        self.tree_depth = num_speculative_tokens if tree_depth is None else tree_depth
        draws = ("without" if lane.rule == "without_replacement" else "with") if binding(lane.rule) else ""
        self.ask = Ask(tree_width, draws)

    # ---- drafter

    def hint(self, view: EngineView) -> Ints:
        """The cap [C] of each slot; 0 where its sequence is as long as the lane can take."""
        out = super().hint(view)
        out[view.known >= self.lane.max_len] = 0
        return out

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """Yields one pass per level, each for all grants that still grow."""
        table = view.table
        known, budget, limit, moves = self._budgets(view, grants)
        trees = Trees(budget, limit, self.ask, self.min_prob)
        if not len(trees.front):
            return Draft.none(len(grants))
        epoch = table.epoch[grants.slot].copy()
        plan: StepPlan | None = self._first(trees, grants.slot, known, moves)
        while plan is not None:
            done = yield plan
            alive = held(table, grants.slot, epoch)
            if "proposed" not in done.exports:  # nobody has caught up yet
                return Draft.none(len(grants))
            trees.grow(done.exports["proposed"][0], alive)
            plan = self._level(trees, grants.slot, known) if len(trees.front) else None
        self._note(trees, grants.slot, known, alive)
        return trees.draft(self.source)

    def draft(self, slots: Ints, budget: Ints) -> Draft:
        """Without passes there is nothing to propose."""
        return Draft.none(len(slots))

    # ---- for subclasses

    def _budgets(self, view: EngineView, grants: Grants) -> tuple[Ints, Ints, Ints, Moves]:
        """Known tokens, nodes and levels [G] of each grant's draft, and block copies to be made before the first pass."""
        table, slot = view.table, grants.slot
        known = table.known[slot].astype(np.int32)
        samples = (grants.start < 0) & (table.computed[slot, 0] + grants.tokens == known) & (self.length[slot] == known)
        # Another drafter's passes may have come before, and an abort with them.
        samples &= held(table, slot, grants.epoch)
        budget = np.where(samples, np.minimum(grants.draft, self.cap[slot]), 0).astype(np.int32)
        limit = np.minimum(np.minimum(self.tree_depth, budget), self.lane.max_len - known + 1).astype(np.int32)
        budget, moves = self._reserve_blocks(view, grants, known, np.where(limit > 0, budget, 0))
        return known, budget, limit, moves

    def _reserve_blocks(self, view: EngineView, grants: Grants, known: Ints, budget: Ints) -> tuple[Ints, Moves]:
        """Make room in the lane for the known tokens and for ``budget`` nodes of each grant. Returns the budgets that have it."""
        raise ConfigError(f"{type(self).__name__} does not say where its rows go", param="method")

    def _note(self, trees: Trees, slots: Ints, known: Ints, alive: np.ndarray) -> None:
        """A draft is complete: remember what of it may be kept in the lane."""

    def _index(self, slots: Ints, upto: Ints) -> None:
        self.done[slots] = upto

    def _drop(self, slot: int) -> None:
        """Nothing of its own by slot."""

    # ---- plans

    def _first(self, trees: Trees, slots: Ints, known: Ints, moves: Moves) -> StepPlan:
        """The rows that the lane lacks; of those who lack more than fits, as many as fit. They do not draft in this step."""
        kv, who = self.lane.cache, trees.owner_of_front
        gap = known[who] - kv.lengths[slots[who]]
        # Short gaps first: a long prompt must not keep the others from drafting.
        order = np.argsort(gap, kind="stable")
        before = np.cumsum(gap[order]) - gap[order]
        count = np.empty(len(gap), np.int32)
        count[order] = np.clip(self.lane.chunk - before, 0, gap[order])
        some = count > 0
        who, gap, count = who[some], gap[some], count[some]
        ready = count == gap
        trees.owner_of_front, trees.front = who[ready], np.full(int(ready.sum()), -1, np.int32)
        slot = slots[who]
        start = kv.lengths[slot].astype(np.int32)
        rows = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        index = (np.arange(rows[-1]) - np.repeat(rows[:-1] - start, count)).astype(np.int32)
        ids = self.tokens.data[np.repeat(self.start[slot], count) + index]
        want = np.where(ready, _TOPK, _NONE).astype(np.uint8)
        nodes = np.zeros(len(who), np.int32)
        return self._plan(slot, start, count, nodes, want, rows, ids, index, index, Draft.none(len(who)), None, moves)

    def _level(self, trees: Trees, slots: Ints, known: Ints) -> StepPlan:
        """The rows of the nodes to expand."""
        owners, draft = trees.computed_draft()
        node, owner = trees.front, trees.owner_of_front
        rows = np.searchsorted(owner, np.append(owners, len(slots))).astype(np.int32)
        position, index = known[owner] + trees.depth[node] - 1, known[owner] + trees.place[node]
        want = np.full(len(owners), _TOPK, np.uint8)
        empty = np.zeros(len(owners), np.int32)
        return self._plan(
            slots[owners], known[owners], empty, np.diff(draft.offset), want, rows, trees.token[node], position, index, draft,
            trees.bits[node], Moves(),
        )  # fmt: skip

    def _plan(
        self, slot: Ints, start: Ints, count: Ints, nodes: Ints, want: np.ndarray, rows: Ints, ids: Ints, position: Ints, index: Ints,
        draft: Draft, ancestors: np.ndarray | None, moves: Moves,
    ) -> StepPlan:  # fmt: skip
        """A pass; the loop numbers it."""
        n = len(slot)
        return StepPlan(
            id=-1, lane=self.lane.index, slot=slot, start=start, count=count, nodes=nodes, layer0=np.zeros(n, np.int32),
            layer1=np.full(n, self.lane.layers, np.int32), want=want, rows=rows, ids=ids, position=position, index=index,
            tables=tables(self.lane.cache, slot, start + count + nodes, np.repeat(slot, np.diff(rows)), index), draft=draft,
            ancestors=ancestors, moves=moves, work=(self.ask,),
        )  # fmt: skip


def tables(kv: KVCache, slots: Ints, upto: Ints, row_slot: Ints, index: Ints) -> tuple[BlockTable, ...]:
    """Block tables of spans that hold ``upto`` tokens each, and the places [T] of their rows."""
    out = []
    for group, table in zip(kv.geometry.groups, kv.tables, strict=True):
        size = group.block_tokens
        blocks = -(-upto // size)
        indptr = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32)
        column = np.arange(indptr[-1]) - np.repeat(indptr[:-1], blocks)
        place = table[row_slot, index // size].astype(np.int64) * size + index % size
        out.append(BlockTable(indptr, table[np.repeat(slots, blocks), column], place))
    return tuple(out)


def held(table: Table, slots: Ints, epoch: Ints) -> np.ndarray:
    """[G] slots that still run the request that they ran at ``epoch`` (empty: whatever runs)."""
    running = table.state[slots] == _RUNNING
    return np.asarray(running & (table.epoch[slots] == epoch) if len(epoch) else running)


def frontiers(table: Table, grants: Grants) -> Ints:
    """Known tokens [G] that lane 0 will hold after the step, drafts aside."""
    return np.asarray(np.where(grants.start < 0, table.computed[grants.slot, 0], grants.start) + grants.tokens, np.int32)
