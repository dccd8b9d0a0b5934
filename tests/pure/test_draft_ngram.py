"""Prompt lookup equals a brute-force search of the latest longest match, whatever happened to the slot before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError
from presage.draft.ngram import NgramDrafter
from presage.engine.null import NullExecutor, null_geometry
from tests.pure.drafts import check, committed, drafted, own, request
from tests.pure.loops import Bench
from tests.pure.test_loop import AllIn


def brute(ids: list[int], low: int, high: int, k: int) -> tuple[int, list[int]]:
    """(match length, ids that follow the latest earlier occurrence of the longest match), reading on into the draft."""
    for n in range(min(high, len(ids) - 1), low - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[len(ids) - n :]:
                text = list(ids)
                for j in range(k):
                    text.append(text[end + j])
                return n, text[len(ids) :]
    return 0, []


def expect(drafter: NgramDrafter, known: dict[int, list[int]], k: int) -> None:
    draft = drafted(drafter, list(known), [k] * len(known))
    check(draft, [k] * len(known))
    for g, ids in enumerate(known.values()):
        n, want = brute(ids, drafter.low, drafter.high, k)
        assert [t for t, _ in own(draft, g)] == want
        if want:
            assert draft.prob[draft.offset[g]] == pytest.approx(n / (n + 1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.integers(1, 3), more=st.integers(0, 3), vocab=st.integers(2, 6))
def test_equals_brute_force_under_every_verb(seed: int, low: int, more: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    drafter, known = NgramDrafter(6, low, low + more), dict[int, list[int]]()
    some = lambda n: rng.integers(0, vocab, n).tolist()  # noqa: E731
    for step in range(40):
        free = [s for s in range(50) if s not in known]
        verb = rng.choice(["open", "advance", "advance", "advance", "rewind", "fork", "close"]) if known else "open"
        slot = int(rng.choice(list(known))) if known else 0
        if verb == "open":
            slot = int(rng.choice(free))
            known[slot] = some(int(rng.integers(1, 30)))
            drafter.open(slot, request(str(step), known[slot]))
        elif verb == "rewind":
            known[slot] = known[slot][: int(rng.integers(1, len(known[slot]) + 1))]
            drafter.rewind(slot, len(known[slot]))
        elif verb == "fork":
            dst = int(rng.choice(free))
            drafter.open(dst, request(str(step), known[slot][:1]))
            drafter.fork(slot, dst, request(str(step), known[slot][:1]))
            known[dst] = list(known[slot])
        elif verb == "close":
            drafter.close(slot)
            del known[slot]
        new = {s: some(int(rng.integers(0, 9))) for s in known}
        drafter.advance(committed(new))
        for s, ids in new.items():
            known[s] += ids
        if known:
            expect(drafter, known, int(rng.integers(1, 7)))


def test_a_short_period_still_gives_a_long_draft() -> None:
    drafter = NgramDrafter(9)
    drafter.open(0, request("a", [4, 1, 2, 3, 1, 2]))
    drafter.advance(committed({0: [3]}))
    assert own(drafted(drafter, [0], [9]), 0) == [(t, i - 1) for i, t in enumerate([1, 2, 3, 1, 2, 3, 1, 2, 3])]


def test_a_long_prompt_is_indexed_by_quota() -> None:
    drafter, text = NgramDrafter(4), np.random.default_rng(0).integers(0, 50, 20000).tolist()
    drafter.open(0, request("a", text))
    drafter.open(1, request("b", [1, 2, 3, 1]))
    drafter.advance(committed({0: [], 1: [2]}))
    assert drafter.done.tolist()[:2] == [8192, 0] and not len(drafted(drafter, [0, 1], [4, 4]))
    drafter.advance(committed({0: [], 1: []}))
    drafter.advance(committed({0: text[:5], 1: []}))
    assert drafter.done.tolist()[:2] == [20005, 5]
    assert [t for t, _ in own(drafted(drafter, [0, 1], [4, 4]), 0)] == text[5:9]
    expect(drafter, {1: [1, 2, 3, 1, 2]}, 4)


def test_requests_may_ask_for_less_or_nothing() -> None:
    drafter, text = NgramDrafter(5), [1, 2, 3, 4, 5, 6, 7, 1, 2]
    for slot, wish in enumerate((None, {"num_speculative_tokens": 2}, {"num_speculative_tokens": 99}, {"method": "none"})):
        drafter.open(slot, request(str(slot), text, draft=wish))
    drafter.advance(committed({s: [3] for s in range(4)}))
    assert np.diff(drafted(drafter, [0, 1, 2, 3], [9] * 4).offset).tolist() == [5, 2, 5, 0]
    assert np.diff(drafted(drafter, [2, 0], [1, 0]).offset).tolist() == [1, 0]


def test_closed_slots_give_their_memory_back() -> None:
    drafter = NgramDrafter(4)
    for turn in range(50):
        drafter.open(3, request(str(turn), list(range(100))))
        drafter.advance(committed({3: [1, 2, 3]}))
        drafter.close(3)
        if not turn:
            sizes = len(drafter.tokens.data), len(drafter.tables.data)
            ends = drafter.tokens._end, drafter.tables._end
    assert (len(drafter.tokens.data), len(drafter.tables.data)) == sizes and (drafter.tokens._end, drafter.tables._end) == ends


@pytest.mark.parametrize("kw", [{"num_speculative_tokens": 0}, {"prompt_lookup_min": 3, "prompt_lookup_max": 2}, {"prompt_lookup_max": 17}])
def test_bad_settings_are_refused(kw: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        NgramDrafter(**kw)
    assert (NgramDrafter(prompt_lookup_max=3).low, NgramDrafter(prompt_lookup_min=4).high) == (3, 4)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_loop_gives_the_same_ids_in_fewer_steps(ahead: bool) -> None:
    rule = lambda slot, position: 10 + position % 7  # noqa: E731
    steps, out = {}, {}
    for drafter in (None, NgramDrafter(6)):
        kw = {"drafter": drafter, "length": AllIn(), "max_drafts": 64} if drafter else {}
        b = Bench(128, executor=NullExecutor(null_geometry(128), rule=rule), async_scheduling=ahead, max_num_batched_tokens=64, **kw)
        for i in range(5):
            b.add(f"r{i}", 20 + 9 * i, max_tokens=40)
        b.drain()
        out[drafter is None] = [b.output(f"r{i}") for i in range(5)]
        steps[drafter is None] = b.loop.steps
        assert b.loop.stats["policy_errors"] == 0
        if drafter:
            assert b.loop.stats["accepted"] > 100 and not drafter.length.any() and not drafter.cap.any()
    assert out[True] == out[False] and steps[False] < steps[True] / 2
