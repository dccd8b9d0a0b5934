"""Conformance kit for acceptance rules: a made-up target, random drafts, and the loop that generates with them.

A rule that claims ``seed_stable`` must give ``generate(...)`` the same ids for every drafter; one that claims ``lossless`` must follow the
target's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from presage.core.plan import Draft, NewIds, StepPlan
from presage.core.types import EMPTY, Ints, Singles, Want

Target = Callable[[list[int]], Singles]
Drafter = Callable[[list[int]], list[tuple[int, int]]]


def random_target(vocab_size: int, seed: int, scale: float = 2.0) -> Target:
    """Raw logits [V] as a fixed random function of the last two ids: short enough that drafts are right now and then."""

    def row(ids: list[int]) -> Singles:
        rng = np.random.default_rng([seed, *ids[-2:]])
        return (scale * rng.standard_normal(vocab_size)).astype(np.float32)

    return row


def random_trees(vocab_size: int, nodes: int, seed: int) -> Drafter:
    """Up to ``nodes`` random (token, parent) pairs per call, parents first, children of a node distinct."""
    rng = np.random.default_rng(seed)

    def draft(ids: list[int]) -> list[tuple[int, int]]:
        tree: list[tuple[int, int]] = []
        for _ in range(int(rng.integers(0, nodes + 1))):
            node = int(rng.integers(0, vocab_size)), int(rng.integers(-1, len(tree)))
            if node not in tree:
                tree.append(node)
        return tree

    return draft


def draft_of(trees: list[list[tuple[int, int]]]) -> Draft:
    """A Draft from (token, parent) lists, one per span."""
    depth: list[int] = []
    for tree in trees:
        own: list[int] = []
        for _, parent in tree:
            own.append(1 if parent < 0 else own[parent] + 1)
        depth += own
    offset = np.concatenate([[0], np.cumsum([len(t) for t in trees])]).astype(np.int32)
    flat = [node for tree in trees for node in tree]
    tokens = np.array([t for t, _ in flat], np.int32)
    parents = np.array([p for _, p in flat], np.int32)
    return Draft(offset, tokens, parents, np.array(depth, np.int32), np.ones(len(flat), np.float32))


def plan_of(slots: list[int], known: list[int], draft: Draft | None = None, rule: str = "keyed") -> StepPlan:
    """A plan whose spans compute their last known token and the draft's nodes. What only a model reads is left empty."""
    n = len(slots)
    draft = Draft.none(n) if draft is None else draft
    nodes = np.diff(draft.offset).astype(np.int32)
    return StepPlan(
        id=0,
        lane=0,
        slot=np.array(slots, np.int32),
        start=np.array(known, np.int32) - 1,
        count=np.ones(n, np.int32),
        nodes=nodes,
        layer0=np.zeros(n, np.int32),
        layer1=np.ones(n, np.int32),
        want=np.full(n, int(Want.SAMPLE), np.uint8),
        rows=np.concatenate([[0], np.cumsum(nodes + 1)]).astype(np.int32),
        ids=EMPTY,
        position=EMPTY,
        index=EMPTY,
        tables=(),
        draft=draft,
        rule=rule,
    )


def target_rows(plan: StepPlan, known: list[list[int]], targets: list[Target]) -> tuple[Singles, Ints, Ints]:
    """(logits, row_span, row_node) of every row of the plan; ``known``: ids per span."""
    rows, span, node = [], [], []
    for s, ids in enumerate(known):
        first, end = int(plan.draft.offset[s]), int(plan.draft.offset[s + 1])
        paths: list[list[int]] = []
        for i in range(first, end):
            parent = int(plan.draft.parent[i])
            paths.append([*(paths[parent] if parent >= 0 else []), int(plan.draft.token[i])])
        for i, path in enumerate([[], *paths]):
            rows.append(targets[s]([*ids, *path]))
            span.append(s)
            node.append(i - 1)
    return np.stack(rows), np.array(span, np.int32), np.array(node, np.int32)


def generate(
    sampler: Any,
    prompts: dict[int, list[int]],
    targets: dict[int, Target],
    tokens: int,
    drafter: Drafter | None = None,
    rule: str = "keyed",
) -> dict[int, list[int]]:
    """Ids generated per open slot until each has ``tokens``: whole steps of all slots, committed through the sampler's companion."""
    known = {slot: list(prompt) for slot, prompt in prompts.items()}
    while live := [s for s in known if len(known[s]) - len(prompts[s]) < tokens]:
        trees = [drafter(known[s]) if drafter else [] for s in live]
        plan = plan_of(live, [len(known[s]) for s in live], draft_of(trees), rule)
        logits, span, node = target_rows(plan, [known[s] for s in live], [targets[s] for s in live])
        judged = sampler.judge(logits, plan, span, node)
        for i, slot in enumerate(live):
            known[slot] += judged.new[judged.new_off[i] : judged.new_off[i + 1]].tolist()
        sampler.advance(NewIds(plan.slot, judged.new_off, judged.new, np.zeros(len(live), np.uint8)))
    return {slot: ids[len(prompts[slot]) :][:tokens] for slot, ids in known.items()}
