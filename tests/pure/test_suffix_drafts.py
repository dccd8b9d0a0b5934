"""Drafts of the batched kernels equal a plain-Python implementation of the paper: ids, parents and probabilities, in path and tree mode."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.plan import NewIds
from presage.core.request import Request
from presage.draft.suffix import SuffixDrafter
from tests.pure.suffix_reference import Reference


def new_ids(ids: dict[int, list[int]]) -> NewIds:
    off = np.concatenate([[0], np.cumsum([len(x) for x in ids.values()])]).astype(np.int32)
    flat = np.array([t for x in ids.values() for t in x], np.int32)
    return NewIds(np.array(list(ids), np.int32), off, flat, np.zeros(len(ids), np.uint8))


class Both:
    """A drafter and its reference, fed alike."""

    def __init__(self, depth: int, cap: int, factor: float, offset: float, floor: float, tree: bool) -> None:
        self.knobs = (cap, factor, offset, floor, tree)
        self.drafter = SuffixDrafter(
            cap, depth, suffix_decoding_max_spec_factor=factor, suffix_decoding_max_spec_offset=offset,
            suffix_decoding_min_token_prob=floor, suffix_decoding_tree=tree,
        )  # fmt: skip
        self.depth, self.shared = depth, Reference(depth)
        self.own: dict[int, Reference] = {}
        self.known: dict[int, list[int]] = {}
        self.number: dict[int, int] = {}

    def open(self, slot: int, prompt: list[int]) -> None:
        self.drafter.open(slot, Request(id=str(slot), prompt=np.array(prompt, np.int32)))
        self.own[slot], self.known[slot], self.number[slot] = Reference(self.depth), list(prompt), len(self.number) + 1000 * slot
        for t in prompt:
            self.own[slot].append(0, t)

    def advance(self, ids: dict[int, list[int]]) -> None:
        self.drafter.advance(new_ids(ids))
        for slot, more in ids.items():
            for t in more:
                self.own[slot].append(0, t)
            for t in more:
                self.shared.append(self.number[slot], t)
            self.known[slot] += more

    def close(self, slot: int) -> None:
        self.drafter.close(slot)
        del self.own[slot], self.known[slot]

    def compare(self, slots: list[int]) -> None:
        cap = self.knobs[0]
        draft, info = self.drafter.speculate(np.array(slots, np.int32), np.full(len(slots), cap, np.int32))
        for i, slot in enumerate(slots):
            a, b = int(draft.offset[i]), int(draft.offset[i + 1])
            nodes, score, match = self.own[slot].speculate(self.known[slot], *self.knobs)
            other = self.shared.speculate(self.known[slot], *self.knobs)
            if other[1] > score:
                nodes, score, match = other
            assert draft.token[a:b].tolist() == [n[0] for n in nodes]
            assert draft.parent[a:b].tolist() == [n[1] for n in nodes]
            assert draft.prob[a:b].tolist() == [float(n[2]) for n in nodes]
            assert info[i, 2] == score
            if nodes:
                assert info[i, 0] == match
            depth = [0] * (b - a)
            for j, p in enumerate(draft.parent[a:b].tolist()):
                depth[j] = 1 if p < 0 else depth[p] + 1
            assert draft.depth[a:b].tolist() == depth


texts = st.lists(st.integers(0, 2), min_size=1, max_size=8)
rounds = st.lists(st.lists(texts, min_size=3, max_size=3), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    depth=st.integers(2, 10), cap=st.integers(1, 12), factor=st.sampled_from([0.5, 1.0, 1.7, 4.0]), offset=st.sampled_from([-1.0, 0.0, 0.3, 2.0]),
    floor=st.sampled_from([0.05, 0.1, 0.3, 1.0]), tree=st.booleans(), script=rounds,
)  # fmt: skip
def test_drafts_equal_the_reference(depth: int, cap: int, factor: float, offset: float, floor: float, tree: bool, script: list) -> None:
    both = Both(depth, cap, factor, offset, floor, tree)
    for slot in range(2):
        both.open(slot, [slot, 1, 0, 1])
    for i, (one, two, three) in enumerate(script):
        both.advance({0: one, 1: two})
        both.compare([1, 0])
        if i == 1:
            both.close(0)
            both.open(0, three)


def test_budget_and_opt_out_bound_the_drafts() -> None:
    d = SuffixDrafter(8, 16)
    prompt = np.array([1, 2, 3, 4, 5, 6, 7, 8] * 3, np.int32)
    d.open(0, Request(id="a", prompt=prompt))
    d.open(1, Request(id="b", prompt=prompt, draft={"method": "none"}))
    d.open(2, Request(id="c", prompt=prompt, draft={"num_speculative_tokens": 3, "suffix_decoding_max_spec_factor": 0.5}))
    d.advance(new_ids({0: [1], 1: [1], 2: [1]}))
    slots = np.arange(3, dtype=np.int32)
    draft = d.draft(slots, np.minimum(d.cap[:3], [2, 8, 8]).astype(np.int32))
    assert np.diff(draft.offset).tolist() == [2, 0, 3]
    assert draft.token[:2].tolist() == [2, 3]
