"""Counts, order and memory of the suffix automaton against brute force, under random inserts, truncations and removals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError
from presage.draft import suffix_tree as k
from presage.draft.suffix_forest import Forest


def brute_counts(sequences: list[list[int]], depth: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(s[i:j]) for s in sequences for i in range(len(s)) for j in range(i + 1, min(len(s), i + depth) + 1))


def children(f: Forest, v: int) -> list[int]:
    if f.S[v, k.DEG] < k.ONE_CHILD:
        return []
    if f.S[v, k.DEG] < 2 * k.ONE_CHILD:
        return [int(f.S[v, k.BEST])]
    out, e = [], int(f.S[v, k.EDGE])
    while e >= 0:
        out.append(int(f.E[e, k.TO]))
        e = int(f.E[e, k.NEXT])
    return out


def reachable(f: Forest, root: int) -> set[int]:
    seen, todo = {root}, [root]
    while todo:
        fresh = [u for u in children(f, todo.pop()) if u not in seen]
        seen.update(fresh)
        todo += fresh
    return seen


def check(f: Forest, root: int, sequences: list[list[int]]) -> None:
    counts = brute_counts(sequences, f.depth)
    for string, n in counts.items():
        assert f.count(root, np.array(string, np.int32)) == n, string
    seen = reachable(f, root)
    sizes = {v: int(f.S[v, k.DEG]) & 255 for v in seen}
    # Each state stands for the strings longer than its link's: together they are all strings there are, so none is left over.
    assert sum(sizes[v] - sizes[int(f.S[v, k.LINK])] for v in seen - {root}) == len(counts)
    for v in seen - {root}:
        below = children(f, v)
        assert len(below) == f.S[v, k.DEG] >> 8
        ranked = [int(f.S[u, k.COUNT]) for u in below]
        assert ranked == sorted(ranked, reverse=True)
        if below:
            assert (f.S[v, k.BEST], f.S[v, k.BCNT]) == (below[0], ranked[0])
    assert f.ctl[k.STATES] == len(seen) + 1  # and state 0, nobody's


def extend(f: Forest, root: int, cursor: int, ids: list[int]) -> int:
    cursors = np.array([cursor], np.int64)
    f.extend(root, cursors, [np.array(ids, np.int32)], np.zeros(1, np.int32))
    return int(cursors[0])


ids = st.lists(st.integers(0, 3), max_size=12)
steps = st.lists(st.tuples(st.sampled_from(["new", "grow", "grow", "cut", "remove"]), st.integers(0, 99), st.integers(0, 99), ids), max_size=20)


@settings(max_examples=120, deadline=None)
@given(depth=st.integers(2, 9), script=steps)
def test_counts_equal_brute_force_under_random_changes(depth: int, script: list[tuple[str, int, int, list[int]]]) -> None:
    f = Forest(depth, 8)
    root = f.root()
    sequences: list[list[int]] = []
    cursors: list[int] = []
    for what, which, where, more in script:
        if what == "new" or not sequences:
            sequences.append(list(more))
            cursors.append(extend(f, root, root, more))
            check(f, root, sequences)
            continue
        i = which % len(sequences)
        if what == "grow":
            cursors[i] = extend(f, root, cursors[i], more)
            sequences[i] = sequences[i] + more
        elif what == "cut":
            n = where % (len(sequences[i]) + 1)
            cursors[i] = f.remove(root, np.array(sequences[i], np.int32), n)
            sequences[i] = sequences[i][:n]
        else:
            f.remove(root, np.array(sequences.pop(i), np.int32))
            cursors.pop(i)
        check(f, root, sequences)
    for s in sequences:
        f.remove(root, np.array(s, np.int32))
    assert (f.ctl[k.STATES], f.ctl[k.EDGES]) == (2, 0)


def test_trees_in_one_forest_do_not_see_each_other() -> None:
    f = Forest(4, 8)
    one, two = f.root(), f.root()
    extend(f, one, one, [1, 2, 3, 1, 2])
    extend(f, two, two, [2, 1])
    assert f.count(one, np.array([1, 2], np.int32)) == 2
    assert f.count(two, np.array([1, 2], np.int32)) == 0
    assert f.count(two, np.array([2, 1], np.int32)) == 1


def test_pools_grow_and_are_used_again() -> None:
    f = Forest(16, 8)
    root = f.root()
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 50, 400).astype(np.int32) for _ in range(5)]
    for s in sequences:
        extend(f, root, root, s.tolist())
    size = f.reserved()
    for s in sequences:
        f.remove(root, s)
        extend(f, root, root, s.tolist())
    assert f.reserved() <= 1.5 * size
    assert f.nbytes() <= 120 * sum(map(len, sequences))


@pytest.mark.parametrize("depth", [0, 1, 256])
def test_depth_out_of_range_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match="depth"):
        Forest(depth)
