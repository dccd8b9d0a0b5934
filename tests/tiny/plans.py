"""Hand-made step plans: sequences with scattered blocks, cut into spans as a test likes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from presage.core.kv import KVGeometry
from presage.core.plan import BlockTable, Draft, Moves, StepPlan
from presage.core.types import Want


@dataclass
class Part:
    """A span: ``tokens`` of slot ``slot`` from ``start``; ``tree``: (token, parent) nodes after them; layers [layer0, layer1)."""

    slot: int
    start: int
    tokens: list[int]
    tree: list[tuple[int, int]] = field(default_factory=list)
    layer0: int = 0
    layer1: int = -1
    want: Want = Want.SAMPLE


class Planner:
    """Owns the blocks of a geometry: each slot takes blocks in a shuffled order, so that tables are never contiguous."""

    def __init__(self, geometry: KVGeometry, layers: int, seed: int = 0) -> None:
        self.geometry, self.layers, self.steps = geometry, layers, 0
        rng = np.random.default_rng(seed)
        self._free = [list(rng.permutation(np.arange(1, n))) for n in geometry.num_blocks]
        self.blocks: dict[tuple[int, int], list[int]] = {}

    def table(self, group: int, slot: int, tokens: int) -> list[int]:
        """Blocks of a slot for ``tokens`` tokens, more taken as needed; those wholly before the window are the null block."""
        mine = self.blocks.setdefault((group, slot), [])
        g = self.geometry.groups[group]
        while len(mine) < g.blocks(tokens):
            mine.append(int(self._free[group].pop()))
        return mine[: g.blocks(tokens)]

    def slots(self, group: int, slot: int, index: np.ndarray) -> np.ndarray:
        """Cache slots of token indices."""
        size = self.geometry.groups[group].block_tokens
        return np.array(self.blocks[group, slot], np.int64)[index // size] * size + index % size

    def plan(self, parts: list[Part], moves: Moves | None = None) -> StepPlan:
        """A step of the given spans."""
        start = np.array([p.start for p in parts], np.int32)
        count = np.array([len(p.tokens) for p in parts], np.int32)
        nodes = np.array([len(p.tree) for p in parts], np.int32)
        rows = np.concatenate([[0], np.cumsum(count + nodes)]).astype(np.int32)
        ids = [t for p in parts for t in [*p.tokens, *(t for t, _ in p.tree)]]
        depth = [_depths(p.tree) for p in parts]
        last = start + count - 1
        position = [np.concatenate([p.start + np.arange(len(p.tokens)), e + d]) for p, e, d in zip(parts, last, depth, strict=True)]
        index = [p.start + np.arange(len(p.tokens) + len(p.tree)) for p in parts]
        tables = tuple(self._table(g, parts, index) for g in range(len(self.geometry.groups)))
        self.steps += 1
        offset = np.concatenate([[0], np.cumsum(nodes)]).astype(np.int32)
        draft = Draft(
            offset, _int32([t for p in parts for t, _ in p.tree]), _int32([a for p in parts for _, a in p.tree]),
            _int32(np.concatenate(depth)), np.ones(int(nodes.sum()), np.float32),
        )  # fmt: skip
        return StepPlan(
            id=self.steps, lane=0, slot=_int32([p.slot for p in parts]), start=start, count=count, nodes=nodes,
            layer0=_int32([p.layer0 for p in parts]), layer1=_int32([self.layers if p.layer1 < 0 else p.layer1 for p in parts]),
            want=np.array([p.want for p in parts], np.uint8), rows=rows, ids=_int32(ids), position=_int32(np.concatenate(position)),
            index=_int32(np.concatenate(index)), tables=tables, draft=draft, ancestors=_ancestors(parts) if nodes.any() else None,
            moves=moves or Moves(),
        )  # fmt: skip

    def _table(self, group: int, parts: list[Part], index: list[np.ndarray]) -> BlockTable:
        blocks = [self.table(group, p.slot, int(i[-1]) + 1) for p, i in zip(parts, index, strict=True)]
        indptr = np.concatenate([[0], np.cumsum([len(b) for b in blocks])])
        slots = np.concatenate([self.slots(group, p.slot, i) for p, i in zip(parts, index, strict=True)])
        shown = [self._window(group, p, b) for p, b in zip(parts, blocks, strict=True)]
        return BlockTable(_int32(indptr), _int32(np.concatenate(shown)), slots.astype(np.int64))

    def _window(self, group: int, part: Part, blocks: list[int]) -> list[int]:
        g = self.geometry.groups[group]
        gone = g.first_kept(part.start) // g.block_tokens
        return [0] * gone + blocks[gone:]


def _int32(x: object) -> np.ndarray:
    return np.asarray(x, np.int32)


def _depths(tree: list[tuple[int, int]]) -> np.ndarray:
    out: list[int] = []
    for _, parent in tree:
        out.append(1 if parent < 0 else out[parent] + 1)
    return np.array(out, np.int64)


def _ancestors(parts: list[Part]) -> np.ndarray:
    words = max(1, -(-max(len(p.tree) for p in parts) // 64))
    out = []
    for p in parts:
        out.extend([[0] * words for _ in p.tokens])
        mine: list[int] = []
        for i, (_, parent) in enumerate(p.tree):
            mine.append((mine[parent] if parent >= 0 else 0) | 1 << i)
        out.extend([[(m >> 64 * w) & (1 << 64) - 1 for w in range(words)] for m in mine])
    return np.array(out, np.uint64)
