"""The masker: masks against brute force, drafts, rewinding, forking, stopping, thinking."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xgrammar as xg

from presage.core.errors import IllegalTransition
from presage.core.plan import Draft, Grants
from presage.core.types import Want
from presage.verify.grammar import Masker
from tests.tiny.grammar_tools import S, byte_compiler, compiler, mask_of, new_ids, plan_of, request, tokenizer, unpacked, walk

PROPERTIES = {"a": {"type": "string", "maxLength": 9}, "b": {"type": "array", "items": {"type": "integer"}}}
JSON = S(json={"type": "object", "properties": PROPERTIES})
WORDS = S(regex="(ab|abc|b[xy]{2,4})+d?")
NESTED = S(grammar='root ::= "(" root ")" | [a-z]{1,3} | root2\nroot2 ::= "<" root* ">"')


@pytest.fixture(scope="module")
def masker() -> Iterator[Masker]:
    made = compiler()
    yield Masker(made)
    made.close()


def brute(masker: Masker, slot: int) -> np.ndarray:
    """Every id of the vocabulary tried on a copy of the matcher."""
    matcher, out = masker.tracks[slot].matcher, np.zeros(masker.compiler.vocab_size, bool)
    for i in range(len(out)):
        out[i] = matcher.accept_token(i)
        if out[i]:
            matcher.rollback(1)
    return out


@pytest.mark.parametrize("params", [JSON, WORDS, NESTED], ids=["json", "regex", "grammar"])
def test_mask_equals_brute_force(masker: Masker, params: S) -> None:
    rng = random.Random(1)
    masker.open(0, request(params))
    for _ in range(6):
        if masker.terminated(0):
            break
        mask = mask_of(masker, 0)
        assert (mask == brute(masker, 0)).all()
        masker.advance(new_ids(0, [rng.choice(np.flatnonzero(mask).tolist())]))


@pytest.mark.parametrize("params", [JSON, WORDS, NESTED], ids=["json", "regex", "grammar"])
def test_rewind_fuzz(masker: Masker, params: S) -> None:
    rng = random.Random(2)
    masker.open(0, request(params, prompt=4))
    ids: list[int] = []
    for _ in range(60):
        if ids and (masker.terminated(0) or rng.random() < 0.35):
            ids = ids[: rng.randrange(len(ids))]
            masker.rewind(0, 4 + len(ids))
            fresh = Masker(masker.compiler)
            fresh.open(7, request(params, prompt=4, emitted=np.array(ids, np.int32)))
            assert fresh.length(7) == masker.length(0) == 4 + len(ids)
            assert (mask_of(fresh, 7) == mask_of(masker, 0)).all()
        else:
            ids.append(rng.choice(np.flatnonzero(mask_of(masker, 0)).tolist()))
            masker.advance(new_ids(0, ids[-1:]))


def test_rewind_takes_back_the_end_of_text(masker: Masker) -> None:
    masker.open(0, request(S(choice=["yes"])))
    ids = tokenizer().encode("yes", add_special_tokens=False)
    masker.advance(new_ids(0, [*ids, 2]))
    assert masker.terminated(0)
    assert np.flatnonzero(mask_of(masker, 0)).tolist() == [0, 2]
    masker.rewind(0, 3)
    assert not masker.terminated(0)
    assert mask_of(masker, 0)[ids[0]]


def test_fork_goes_its_own_way(masker: Masker) -> None:
    masker.open(0, request(WORDS))
    masker.advance(new_ids(0, tokenizer().encode("ab", add_special_tokens=False)))
    masker.fork(0, 1, request(WORDS, "child"))
    assert masker.length(1) == masker.length(0)
    before = mask_of(masker, 0)
    assert (mask_of(masker, 1) == before).all()
    masker.advance(new_ids(1, tokenizer().encode("d", add_special_tokens=False)))
    assert masker.terminated(1)
    assert not masker.terminated(0)
    assert (mask_of(masker, 0) == before).all()
    masker.fork(0, 2, request(None, "free"))
    assert not masker.constrained(2)


def tree(tokens: list[int], parents: list[int]) -> Draft:
    depth: list[int] = []
    for p in parents:
        depth.append(1 if p < 0 else depth[p] + 1)
    n = len(tokens)
    arrays = (np.array(x, np.int32) for x in (tokens, parents, depth))
    return Draft(np.array([0, n], np.int32), *arrays, np.ones(n, np.float32))


def byte_masker() -> Masker:
    return Masker(byte_compiler())


def test_tree_masks_equal_those_of_each_path() -> None:
    masker = byte_masker()
    masker.open(0, request(WORDS))
    text = [b"a", b"b", b"b", b"c", b"x", b"a", b"q", b"x"]
    draft = tree([t[0] for t in text], [-1, -1, 0, 2, 1, 3, 0, 6])
    late = masker.late(plan_of(masker, [0], draft))
    assert late is not None
    pairs, bits = late.masks()
    assert [p[1] for p in pairs.tolist()] == [-1, 0, 2, 3, 5, 1, 4]  # depth first; q and what follows it are on no legal path
    for (_, node), row in zip(pairs.tolist(), bits):
        path, at = [], node
        while at >= 0:
            path.append(int(draft.token[at]))
            at = int(draft.parent[at])
        fresh = byte_masker()
        fresh.open(0, request(WORDS))
        fresh.advance(new_ids(0, path[::-1]))
        assert (unpacked(row, 257) == mask_of(fresh, 0)).all()
    assert (mask_of(masker, 0) == unpacked(bits[0], 257)).all()  # the walk left the matcher where it was


def test_prune_drops_illegal_nodes_with_their_subtrees() -> None:
    masker = byte_masker()
    masker.open(0, request(WORDS))
    masker.open(1, request(None, "free"))
    first = tree([97, 98, 98, 113, 120, 99], [-1, -1, 0, 0, 3, 2])
    token, parent, depth = (np.append(x, v).astype(np.int32) for x, v in ((first.token, 5), (first.parent, -1), (first.depth, 1)))
    draft = Draft(np.array([0, 6, 7], np.int32), token, parent, depth, np.ones(7, np.float32))
    out = masker.prune(draft, Grants.of([0, 1], [1, 1], 4, draft=[6, 1]))
    assert out.offset.tolist() == [0, 4, 5]
    assert out.token.tolist() == [97, 98, 98, 99, 5]
    assert out.parent.tolist() == [-1, -1, 0, 2, -1]


def test_prune_keeps_an_illegal_node_that_was_sampled() -> None:
    masker = byte_masker()
    masker.open(0, request(WORDS))
    draft = tree([113, 98, 97], [-1, 0, -1])
    draft.trial_node, draft.trial_q = np.array([0, 2], np.int32), np.array([0, -1], np.int32)
    out = masker.prune(draft, Grants.of([0], [1], 4, draft=[3]))
    assert out.token.tolist() == [113, 97]
    assert out.trial_node.tolist() == [0, 1]


def test_late_only_for_constrained_spans_that_sample() -> None:
    masker = byte_masker()
    masker.open(0, request(None, "free"))
    masker.open(1, request(WORDS))
    assert masker.late(plan_of(masker, [0])) is None
    assert masker.late(plan_of(masker, [0, 1], want=int(Want.NONE))) is None
    late = masker.late(plan_of(masker, [0, 1]))
    assert late is not None
    assert late.masks()[0].tolist() == [[1, -1]]
    stale = plan_of(masker, [1])
    masker.advance(new_ids(1, [98]))
    with pytest.raises(IllegalTransition):
        masker.late(stale)


def test_fill_and_masks_from_two_threads_agree() -> None:
    masker = byte_masker()
    masker.open(0, request(WORDS))
    late = masker.late(plan_of(masker, [0]))
    assert late is not None
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=f) for f in (late.fill, lambda: found.append(late.masks()[1]), late.fill)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert late.masks()[1] is found[0]


def test_end_of_text_only_when_complete_and_after_min_tokens() -> None:
    masker = byte_masker()
    masker.open(0, request(S(regex="[ab]{2,4}"), sampling={"min_tokens": 3}))
    seen = []
    for _ in range(4):
        seen.append(bool(mask_of(masker, 0)[256]))
        assert masker.may_stop(0) == (len(seen) > 2)
        masker.advance(new_ids(0, [97]))
    assert seen == [False, False, False, True]
    assert masker.terminated(0)
    short = request(S(choice=["ab"]), sampling={"min_tokens": 9})
    masker.open(0, short)
    masker.advance(new_ids(0, [97, 98]))
    assert np.flatnonzero(mask_of(masker, 0)).tolist() == [256]  # nothing else is left


def test_min_tokens_in_a_tree_counts_the_path() -> None:
    masker = byte_masker()
    masker.open(0, request(S(regex="a{1,9}"), sampling={"min_tokens": 2}))
    late = masker.late(plan_of(masker, [0], tree([97, 97, 97], [-1, 0, 1])))
    assert late is not None
    assert [bool(unpacked(row, 257)[256]) for row in late.masks()[1]] == [False, False, True, True]


def test_thinking_is_free_until_its_end() -> None:
    masker = byte_masker()
    masker.open(0, request(S(choice=["ab"]), extras={"thinking_end_id": 10}))
    late = masker.late(plan_of(masker, [0], tree([120, 10, 97, 98], [-1, 0, 1, 2])))
    assert late is not None
    pairs, bits = late.masks()
    assert [p[1] for p in pairs.tolist()] == [1, 2, 3]
    assert [np.flatnonzero(unpacked(row, 257)).tolist() for row in bits] == [[97], [98], [256]]
    assert masker.may_stop(0)
    masker.advance(new_ids(0, [120, 121, 10, 97]))
    assert not masker.may_stop(0)
    assert np.flatnonzero(mask_of(masker, 0)).tolist() == [98]
    masker.rewind(0, 4)
    late = masker.late(plan_of(masker, [0]))
    assert late is not None and not len(late.masks()[0])
    masker.advance(new_ids(0, [10, 97, 98]))
    assert masker.terminated(0)


def test_an_injected_id_that_the_grammar_refuses_ends_the_text() -> None:
    masker = byte_masker()
    masker.open(0, request(S(choice=["abc"])))
    masker.advance(new_ids(0, [97, 120, 98]))
    assert masker.terminated(0)
    assert np.flatnonzero(mask_of(masker, 0)).tolist() == [256]
    masker.rewind(0, 4)
    assert not masker.terminated(0)
    assert np.flatnonzero(mask_of(masker, 0)).tolist() == [98]


def test_emitted_ids_of_a_resumed_request_count(masker: Masker) -> None:
    masker.open(0, request(JSON))
    _, ids, _ = walk(masker, 0, random.Random(4), 6, eager=False)
    resumed = Masker(masker.compiler)
    resumed.open(3, request(JSON, emitted=np.array(ids, np.int32)))
    assert resumed.length(3) == 3 + len(ids)
    assert resumed.terminated(3) == masker.terminated(0)
    resumed.close(3)
    assert not resumed.constrained(3)


def test_the_engine_is_the_version_these_rules_were_found_on() -> None:
    matcher = xg.GrammarMatcher(byte_compiler().compile(S(choice=["a"])))
    assert matcher.accept_token(97) and matcher.is_completed() and not matcher.is_terminated()
    assert matcher.accept_token(256) and matcher.is_terminated() and not matcher.accept_token(256)
