"""Late binding: grants become a StepPlan once the previous result is known, so planning ahead holds no ids, positions or blocks."""

from __future__ import annotations

import numpy as np

from presage.core.plan import BlockTable, Draft, Grants, Moves, StepPlan
from presage.core.protocols import KVCache
from presage.core.table import Arena, Table
from presage.core.types import Ints, Words
from presage.engine.kernels import bind_rows, bind_spans, bind_table, bind_tree, reach, table_size


def frontier(table: Table, grants: Grants, lane: int) -> Ints:
    """Tokens each grant will have computed: its explicit start or the lane's frontier now, plus its tokens."""
    out = np.empty(len(grants), np.int32)
    reach(grants.slot, grants.start, grants.tokens, table.computed[:, lane], out)
    return out


def bind(
    step: int, lane: int, table: Table, arena: Arena, kv: KVCache, grants: Grants, draft: Draft, moves: Moves, layers: int, tables: bool = True
) -> StepPlan:  # fmt: skip
    """The plan of one forward pass. Rows of a span: its known tokens, then its draft nodes. Without ``tables`` it has no addresses in the KV."""
    t, slot, count, n = table, grants.slot, grants.tokens, len(grants)
    nodes = draft.offset[1:] - draft.offset[:-1]
    start, rows, want = np.empty(n, np.int32), np.empty(n + 1, np.int32), np.empty(n, np.uint8)
    total = bind_spans(
        slot,
        count,
        nodes,
        grants.start,
        grants.layer1,
        layers,
        t.computed,
        lane,
        t.lead,
        t.kind,
        t.flags,
        t.known,
        t.prompt,
        start,
        want,
        rows,
    )
    ids, position, index = np.empty(total, np.int32), np.empty(total, np.int32), np.empty(total, np.int32)
    bind_rows(slot, start, count, nodes, draft.depth, draft.offset, t.row, arena.ids, draft.token, ids, position, index, rows)
    return StepPlan(
        id=step,
        lane=lane,
        slot=slot,
        start=start,
        count=count,
        nodes=nodes,
        layer0=grants.layer0,
        layer1=grants.layer1,
        want=want,
        rows=rows,
        ids=ids,
        position=position,
        index=index,
        tables=tuple([_table(kv, g, slot, start, count, nodes, rows, index) for g in range(len(kv.tables) if tables else 0)]),
        draft=draft,
        ancestors=_ancestors(count, nodes, draft, rows) if len(draft) else None,
        moves=moves,
        repeat=grants.repeat,
    )


def _table(kv: KVCache, group: int, slot: Ints, start: Ints, count: Ints, nodes: Ints, rows: Ints, index: Ints) -> BlockTable:
    block = kv.geometry.groups[group].block_tokens
    indptr = np.empty(len(slot) + 1, np.int32)
    blocks = np.empty(table_size(start, count, nodes, block, indptr), np.int32)
    slots = np.empty(len(index), np.int64)
    bind_table(slot, rows, index, kv.tables[group], block, indptr, blocks, slots)
    return BlockTable(indptr, blocks, slots)


def _ancestors(count: Ints, nodes: Ints, draft: Draft, rows: Ints) -> Words:
    words = -(-int(nodes.max()) // 64)
    bits = np.zeros((int(rows[-1]), words), np.uint64)
    bind_tree(count, nodes, draft.offset, draft.parent, rows, bits)
    return bits
