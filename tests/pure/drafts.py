"""Helpers for tests of drafters: ids as lists, drafts as sets of paths."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.core.plan import Draft, Grants, NewIds
from presage.core.request import Request


def request(name: str, prompt: list[int], **kw: Any) -> Request:
    """A request with that prompt."""
    return Request(id=name, prompt=np.array(prompt, np.int32), **kw)


def committed(ids: dict[int, list[int]]) -> NewIds:
    """New ids by slot."""
    off = np.concatenate([[0], np.cumsum([len(v) for v in ids.values()])]).astype(np.int32)
    flat = [t for v in ids.values() for t in v]
    return NewIds(np.array(list(ids), np.int32), off, np.array(flat, np.int32), np.zeros(len(ids), np.uint8))


def grants(slots: list[int], draft: list[int]) -> Grants:
    """One known token and up to ``draft`` nodes each."""
    return Grants.of(slots, [1] * len(slots), 1, draft=draft)


def drafted(drafter: Any, slots: list[int], budget: list[int], view: Any = None) -> Draft:
    """What ``propose`` returns of a drafter without passes."""
    run = drafter.propose(view, grants(slots, budget))
    try:
        next(run)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a look-up must not yield passes")


def own(draft: Draft, g: int) -> list[tuple[int, int]]:
    """(token, parent) of a grant's nodes."""
    a, b = draft.offset[g], draft.offset[g + 1]
    return list(zip(draft.token[a:b].tolist(), draft.parent[a:b].tolist(), strict=True))


def paths(draft: Draft, g: int) -> dict[tuple[int, ...], float]:
    """Path -> probability of each node of a grant."""
    out: list[tuple[int, ...]] = []
    for token, parent in own(draft, g):
        out.append((*(out[parent] if parent >= 0 else ()), token))
    return dict(zip(out, draft.prob[draft.offset[g] : draft.offset[g + 1]].tolist(), strict=True))


def check(draft: Draft, budget: list[int]) -> None:
    """What every draft must satisfy: parents first, unique (parent, token), depths, probabilities that never rise, within budget."""
    assert len(draft.offset) == len(budget) + 1 and draft.offset[-1] == len(draft.token) == len(draft.source)
    for g, most in enumerate(budget):
        nodes, a = own(draft, g), int(draft.offset[g])
        assert len(nodes) <= most and len(set(nodes)) == len(nodes)
        for i, (_, parent) in enumerate(nodes):
            assert -1 <= parent < i
            assert draft.depth[a + i] == (1 if parent < 0 else draft.depth[a + parent] + 1)
            assert 0 < draft.prob[a + i] <= (1 if parent < 0 else draft.prob[a + parent])
