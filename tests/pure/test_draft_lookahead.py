"""The lookahead trie counts what brute force counts, prunes as the paper says, forgets closed prompts, and drafts the strongest branches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError
from presage.draft.lookahead import LookaheadDrafter
from presage.draft.lookahead_trie import (
    ALL,
    CHILD,
    FREE,
    FREQ,
    KEYS,
    META,
    NEXT,
    PARENT,
    PREV,
    SIZE,
    TOKEN,
    Trie,
    find,
    free_below,
    prune,
    prune_root,
    put,
)
from presage.engine.null import NullExecutor, null_geometry
from tests.pure.drafts import check, committed, drafted, own, paths, request
from tests.pure.loops import Bench
from tests.pure.test_loop import AllIn


def windows(ids: list[int], depth: int, first: int = 0, last: int | None = None) -> Counter[tuple[int, ...]]:
    """Times each path of up to 1 + depth ids begins at a start in [first, last)."""
    out: Counter[tuple[int, ...]] = Counter()
    for i in range(first, len(ids) if last is None else last):
        for n in range(1, min(depth + 1, len(ids) - i) + 1):
            out[tuple(ids[i : i + n])] += 1
    return out


def counts(t: Any, root: int) -> dict[tuple[int, ...], float]:
    """Frequencies by path, with a check of every link and of the hash on the way."""
    out, todo = dict[tuple[int, ...], float](), [(root, ())]
    while todo:
        node, path = todo.pop()
        before, child = -1, int(t[CHILD][node])
        while child >= 0:
            token = int(t[TOKEN][child])
            assert t[PARENT][child] == node and t[PREV][child] == before and find(t, node, token) == child
            out[(*path, token)] = float(t[FREQ][child])
            todo.append((child, (*path, token)))
            before, child = child, int(t[NEXT][child])
    return out


def audit(trie: Trie, roots: list[int]) -> None:
    """Nodes in use are those reachable; the hash holds nothing else."""
    reachable = len(roots) + sum(len(counts(trie.arrays, r)) for r in roots)
    assert trie.nodes == reachable == len(trie.arrays[TOKEN]) - trie.arrays[META][0]
    assert (trie.arrays[KEYS] >= 0).sum() == reachable - len(roots)
    assert len(set(trie.arrays[FREE][: trie.arrays[META][0]].tolist())) == trie.arrays[META][0]


def halved(law: dict[tuple[int, ...], float], tree: int) -> dict[tuple[int, ...], float]:
    """A pruned tree by recursion: nodes above 1 are halved, others go with what is below them."""
    out, gone = dict[tuple[int, ...], float](), set()
    for path, n in sorted(law.items()):
        if path[0] != tree:
            out[path] = n
        elif len(path) == 1:
            out[path] = n / 2 if n > 1 else n
        elif path[:-1] in gone or n <= 1:
            gone.add(path)
        else:
            out[path] = n / 2
    return out


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 5))
def test_counts_links_and_hash_survive_anything(seed: int, depth: int) -> None:
    rng, trie = np.random.default_rng(seed), Trie(16)
    roots, want = [trie.root(), trie.root()], [dict[tuple[int, ...], float](), dict[tuple[int, ...], float]()]
    for _ in range(12):
        r, verb = int(rng.integers(0, 2)), rng.choice(["put", "put", "prune", "free", "reset"])
        ids = rng.integers(0, 4, int(rng.integers(1, 20))).astype(np.int32)
        tree = find(trie.arrays, roots[r], 2)
        if verb == "put":
            trie.reserve(len(ids) * (depth + 1))
            put(trie.arrays, roots[r], ids, 0, len(ids), len(ids), depth, 10**6)
            for path, n in windows(ids.tolist(), depth).items():
                want[r][path] = want[r].get(path, 0) + n
        elif verb == "prune" and tree >= 0:
            before = len(want[r])
            want[r] = halved(want[r], 2)
            assert prune(trie.arrays, tree) == before - len(want[r])
        elif verb == "free" and tree >= 0:
            free_below(trie.arrays, tree, ALL)
            want[r] = {p: n for p, n in want[r].items() if p[0] != 2}
        elif verb == "reset":
            parts = [trie.free(roots[r], 3)]
            while parts[-1] < 0:
                parts.append(trie.free(roots[r], 3))
            assert sum(map(abs, parts)) == len(want[r]) + 1
            roots[r], want[r] = trie.root(), {}
        assert [counts(trie.arrays, x) for x in roots] == want
        audit(trie, roots)
        for x in roots:
            for token in range(4):
                tree = find(trie.arrays, x, token)
                assert tree < 0 or trie.arrays[SIZE][tree] == sum(p[0] == token for p in counts(trie.arrays, x)) - 1


def test_prune_root_drops_what_was_seen_once() -> None:
    trie = Trie()
    root, ids = trie.root(), np.array([1, 2, 1, 2, 3], np.int32)
    trie.reserve(100)
    put(trie.arrays, root, ids, 0, 5, 5, 2, 10**6)
    freed = prune_root(trie.arrays, root)
    left = counts(trie.arrays, root)
    assert left == {(1,): 1.0, (1, 2): 1.0, (2,): 1.0} and freed == len(windows(ids.tolist(), 2)) - len(left)


class Oracle:
    """Retrieval in plain Python over counters of paths."""

    def __init__(self, prompt: Counter[tuple[int, ...]], shared: Counter[tuple[int, ...]], branch: int, query: int) -> None:
        self.prompt, self.shared, self.branch, self.query = prompt, shared, branch, query

    def draft(self, ids: list[int], budget: int) -> dict[tuple[int, ...], float]:
        out: dict[tuple[int, ...], float] = {}
        for k in range(min(self.query, len(ids)), 0, -1):
            if len(out) >= min(self.branch, budget):
                break
            q = tuple(ids[-k:])
            both = q in self.prompt and q in self.shared
            if both:
                self._take(out, q, min(budget, len(out) + budget // 2), lambda p: self.shared[p])
            self._take(out, q, budget, lambda p: self.prompt[p] * (1 - 1e-4) + self.shared[p] * 1e-4)
        return out

    def _take(self, out: dict[tuple[int, ...], float], q: tuple[int, ...], limit: int, score: Any) -> None:
        below = {p[len(q) :] for c in (self.prompt, self.shared) for p in c if p[: len(q)] == q and len(q) < len(p) <= len(q) + self.branch}
        total = self.prompt[q] + self.shared[q] + 1
        for path in sorted((p for p in below if score(q + p) > 0), key=lambda p: (-score(q + p), p)):
            if len(out) >= limit:
                return
            sure = (self.prompt[q + path] + self.shared[q + path]) / total
            out.setdefault(path, min(sure, out.get(path[:-1], 1.0)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 12))
def test_drafts_equal_a_plain_retrieval(seed: int, vocab: int) -> None:
    """With room for all nodes the sets and probabilities are equal; with less, the total score is (ties may fall either way)."""
    rng = np.random.default_rng(seed)
    branch, query = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    drafter = LookaheadDrafter(400, decoding_length=400, branch_length=branch, query_length=query)
    old, prompt = (rng.integers(0, vocab, n).tolist() for n in (60, 40))
    drafter.open(9, request("old", [0]))
    drafter.advance(committed({9: old}))
    drafter.close(9)
    drafter.open(1, request("now", prompt))
    new = rng.integers(0, vocab, branch).tolist()  # so few that none of them is in the trie yet
    drafter.advance(committed({1: new}))
    oracle = Oracle(windows(prompt, branch), windows([0, *old], branch, 1), branch, query)
    for budget in (400, 3):
        draft = drafted(drafter, [1], [budget])
        check(draft, [budget])
        want, got = oracle.draft(prompt + new, budget), paths(draft, 0)
        if budget == 400:
            assert got == pytest.approx(want)
        else:
            assert len(got) == len(want) and all(len(p) <= branch for p in got)


def test_the_prompt_ranks_first_and_outputs_keep_half() -> None:
    drafter = LookaheadDrafter(8, branch_length=3, query_length=1)
    drafter.open(0, request("old", [0]))
    drafter.advance(committed({0: [5, 1, 5, 1, 5, 1, 5, 2]}))
    drafter.close(0)
    drafter.open(0, request("now", [5, 8, 0, 5, 8, 0, 5, 9, 0, 5]))
    drafter.advance(committed({0: [5]}))
    got = paths(drafted(drafter, [0], [4]), 0)
    assert {p[0] for p in got} >= {1, 8} and sum(p[0] in (1, 2) for p in got) == 2
    drafter.tree = False
    assert [t for t, _ in own(drafted(drafter, [0], [8]), 0)] == [8, 0, 5]


def test_prompts_are_private_outputs_are_shared_by_tenant() -> None:
    drafter, text = LookaheadDrafter(6, branch_length=4), [3, 4, 5, 6, 7, 3, 4]
    for slot, tenant in enumerate(("a", "a", "b")):
        drafter.open(slot, request(str(slot), text if slot == 0 else [1], tenant=tenant))
    drafter.advance(committed({0: [9], 1: [3, 4], 2: [3, 4]}))
    assert np.diff(drafted(drafter, [1, 2], [6, 6]).offset).tolist() == [0, 0]
    drafter.advance(committed({0: text}))
    drafter.close(0)  # now its output is known to tenant a, cut windows at the end too
    assert [t for t, _ in own(drafted(drafter, [1, 2], [4, 4]), 0)] == [5, 6, 7, 3]
    assert np.diff(drafted(drafter, [1, 2], [6, 6]).offset)[1] == 0
    drafter.close(1)
    drafter.close(2)
    drafter.sweep(10**9)
    audit(drafter.trie, [0, *drafter.spaces.values()])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_output_counts_are_exact_under_every_verb(seed: int) -> None:
    """Without rewinds every window of every output is in the shared trie once; prompts leave nothing behind."""
    rng = np.random.default_rng(seed)
    drafter = LookaheadDrafter(16, branch_length=3, max_output_node=10**6)
    drafter.quota = int(rng.integers(3, 40))
    live, want = dict[int, tuple[list[int], list[int], int]](), Counter[tuple[int, ...]]()
    for step in range(30):
        free = [s for s in range(40) if s not in live]
        verb = rng.choice(["open", "advance", "advance", "fork", "close"]) if live else "open"
        slot = int(rng.choice(list(live))) if live else 0
        if verb == "open":
            slot, prompt = int(rng.choice(free)), rng.integers(0, 4, int(rng.integers(1, 25))).tolist()
            drafter.open(slot, request(str(step), prompt))
            live[slot] = prompt, [], 0
        elif verb == "close":
            prompt, out, skip = live.pop(slot)
            while drafter.done[slot] < len(prompt):
                drafter.advance(committed({slot: []}))
            drafter.close(slot)
            want += windows(out, 3, skip)
        elif verb == "fork" and drafter.done[slot] >= len(live[slot][0]):
            prompt, out, _ = live[slot]
            dst = int(rng.choice(free))
            drafter.open(dst, request(str(step), prompt))
            drafter.fork(slot, dst, request(str(step), prompt))
            live[dst] = prompt, list(out), int(drafter.done[slot]) - len(prompt)
        new = {s: rng.integers(0, 4, int(rng.integers(0, 6))).tolist() for s in live}
        drafter.advance(committed(new))
        for s, ids in new.items():
            live[s][1].extend(ids)
        check(drafted(drafter, list(live), [5] * len(live)), [5] * len(live))
    for slot, (prompt, out, skip) in live.items():
        while drafter.done[slot] < len(prompt):
            drafter.advance(committed({slot: []}))
        drafter.close(slot)
        want += windows(out, 3, skip)
    (root,) = drafter.spaces.values()
    assert counts(drafter.trie.arrays, root) == dict(want)
    drafter.sweep(10**9)
    audit(drafter.trie, [0, root])


def test_memory_is_bounded() -> None:
    rng, drafter = np.random.default_rng(0), LookaheadDrafter(16, branch_length=4, max_output_node=64, max_nodes=3000)
    for turn in range(60):
        drafter.open(0, request(str(turn), [1]))
        drafter.advance(committed({0: rng.integers(0, 300, 100).tolist()}))
        drafter.advance(committed({0: []}))
        drafter.close(0)
        drafter.open(0, request("again", [1]))
        drafter.advance(committed({0: [1] * 6}))
        assert drafter.trie.nodes <= 3000
        drafter.close(0)
    (root,) = drafter.spaces.values()
    drafter.sweep(10**9)
    audit(drafter.trie, [0, root])


def test_rewinding_into_the_prompt_forgets_it() -> None:
    drafter = LookaheadDrafter(8, branch_length=4)
    drafter.open(0, request("a", [1, 2, 3, 4, 5, 6, 1, 2]))
    drafter.advance(committed({0: []}))
    assert [t for t, _ in own(drafted(drafter, [0], [4]), 0)][:1] == [3]
    drafter.rewind(0, 2)
    drafter.advance(committed({0: [1, 2]}))
    assert own(drafted(drafter, [0], [4]), 0) == []
    drafter.close(0)
    drafter.sweep(10**9)
    audit(drafter.trie, [0, *drafter.spaces.values()])


@pytest.mark.parametrize("name", ["decoding_length", "branch_length", "query_length"])
def test_bad_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name if name != "decoding_length" else "at least 1"):
        LookaheadDrafter(**{name: 0})


def test_the_loop_gives_the_same_ids_in_fewer_steps() -> None:
    rule = lambda slot, position: 10 + position % 7  # noqa: E731
    steps, out = [], []
    for drafter in (None, LookaheadDrafter(8), LookaheadDrafter(8, tree=False)):
        kw = {"drafter": drafter, "length": AllIn(), "max_drafts": 64} if drafter else {}
        b = Bench(128, executor=NullExecutor(null_geometry(128), rule=rule), max_num_batched_tokens=64, **kw)
        for i in range(4):
            b.add(f"r{i}", 20 + 9 * i, max_tokens=60)
        b.drain()
        out.append([b.output(f"r{i}") for i in range(4)])
        steps.append(b.loop.steps)
        assert b.loop.stats["policy_errors"] == 0
    assert out[0] == out[1] == out[2] and max(steps[1:]) < steps[0] * 0.7
