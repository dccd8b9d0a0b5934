"""Workload columns, arrivals, tags, and what becomes of them: requests for the simulator, ids for a server."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.bench.workloads import (
    Ragged,
    Requests,
    Workload,
    at_rate,
    closed_loop,
    ramp_times,
    replayed,
    sessions_of,
    to_requests,
    tokenised,
    with_deadlines,
    with_priorities,
    with_rate,
    with_tenants,
    with_times,
    within,
)
from presage.bench.workloads.contents import ids_in, real_ids
from presage.bench.workloads.requests import prompt_ids, text_ids
from presage.core.errors import ConfigError


def singles(n: int, **more: object) -> Workload:
    return Workload("w", np.arange(n) * 1.0, n_in=np.full(n, 10), n_out=np.full(n, 5)).with_columns(**more)


class Letters:
    """A tokenizer of one id per character."""

    vocab_size = 200
    special_ids = frozenset({0, 1})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Code points."""
        return [ord(c) for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Back."""
        return "".join(map(chr, ids))


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.data())
def test_ragged_rows_are_what_went_in(rows: list[list[int]], data: st.DataObject) -> None:
    made = Ragged.of(rows)
    assert [made.row(i).tolist() for i in range(len(made))] == rows
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)) if rows else []
    taken = made.take(np.array(chosen, np.int64))
    assert [taken.row(i).tolist() for i in range(len(taken))] == [rows[i] for i in chosen]


def test_columns_of_the_wrong_length_and_rows_after_later_ones_are_refused() -> None:
    with pytest.raises(ConfigError, match="column n_in"):
        Workload("w", np.zeros(3), n_in=np.zeros(2))
    with pytest.raises(ConfigError, match="after itself"):
        Workload("w", np.zeros(2), after=np.array([1, -1]))
    with pytest.raises(ConfigError, match="neither"):
        Workload("w", np.array([0.0, math.nan]))
    with pytest.raises(ConfigError, match="has no"):
        singles(2).with_columns(colour=1)


def test_the_first_requests_are_whole_chains() -> None:
    w = sessions_of(singles(9), turns=3, think=1.0)
    w = with_times(w, np.array([5.0, 1.0, 3.0]))
    few = w.first(5)
    assert few.session.tolist() == [1, 1, 1, 2, 2] and few.after.tolist() == [-1, 0, 1, -1, 3]
    assert few.arrival[[0, 3]].tolist() == [1.0, 3.0]


def test_rates_and_replays() -> None:
    w = singles(100)
    assert with_rate(w, 4.0).duration == pytest.approx(25.0)
    fast = replayed(w, 5.0)
    assert np.allclose(fast.arrival * 5, w.arrival)
    assert at_rate(w, 10.0).rate == pytest.approx(10.0)
    with pytest.raises(ConfigError):
        at_rate(w.with_columns(arrival=np.zeros(100)), 2.0)
    with pytest.raises(ConfigError):
        replayed(w, 0.0)


def test_a_ramp_has_its_rates_at_both_ends() -> None:
    for how in ("linear", "exponential"):
        gaps = np.diff(ramp_times(1000, 2.0, 20.0, how))
        assert 1 / gaps[0] == pytest.approx(2.0, rel=0.02) and 1 / gaps[-1] == pytest.approx(20.0, rel=0.02)
    assert ramp_times(3000, 5.0, 5.0, seed=1)[-1] == pytest.approx(600, rel=0.1)
    with pytest.raises(ConfigError):
        ramp_times(3, 0.0, 1.0)


def test_a_closed_loop_keeps_at_most_its_users_in_flight() -> None:
    w = closed_loop(singles(10), users=3, think=0.5)
    assert len(w.roots) == 3 and (w.arrival[w.roots] == 0).all()
    assert w.after[3:].tolist() == list(range(7)) and (w.think[3:] == 0.5).all()
    # Whoever ends starts exactly one other.
    assert len(set(w.after[3:].tolist())) == 7
    chats = closed_loop(sessions_of(singles(8), turns=2, think=0.0), users=1)
    assert chats.after.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]


def test_tags_are_drawn_per_session() -> None:
    w = with_priorities(with_tenants(sessions_of(singles(400), 2, 0.0), 3, skew=1.0), [0.25, 0.75])
    assert (w.tenant[::2] == w.tenant[1::2]).all() and (w.priority[::2] == w.priority[1::2]).all()
    counts = np.bincount(w.tenant, minlength=3)
    assert counts[0] > counts[1] > counts[2] > 0
    assert with_deadlines(w, first=2.0).due_first[0] == 2.0
    for bad in (lambda: with_tenants(w, 0), lambda: with_priorities(w, [0.5]), lambda: with_deadlines(w, end=0.0)):
        with pytest.raises(ConfigError):
            bad()


def test_requests_carry_their_columns() -> None:
    w = with_deadlines(with_tenants(singles(3), ["a"]), first=1.0, end=9.0)
    made = list(to_requests(w))
    assert [r.arrival for r in made] == [0.0, 1.0, 2.0] and [len(r.prompt) for r in made] == [10] * 3
    assert made[2].tenant == "a" and made[2].salt == b"a" and (made[2].due_first, made[2].due_end) == (3.0, 11.0)
    assert made[0].sampling.max_tokens == 5 and made[0].prompt.dtype == np.int32
    assert not set(made[0].prompt.tolist()) & set(made[1].prompt.tolist())


def test_equal_hashes_are_equal_content_and_nothing_else_is() -> None:
    hashes = Ragged.of([[7, 8], [7, 9], [6, 8]])
    w = Workload("h", np.zeros(3), n_in=np.array([8, 10, 7]), n_out=np.ones(3), block=4, hashes=hashes)
    a, b, c = (prompt_ids(w, i).tolist() for i in range(3))
    assert a[:4] == b[:4] and not set(a[4:]) & set(b[4:]) and not set(a[:4]) & set(c[:4])
    assert len(b) == 10 and len(c) == 7 and a[4:7] == c[4:7]


@settings(max_examples=30)
@given(st.integers(0, 1 << 45), st.integers(0, 1 << 45))
def test_made_up_texts_differ(a: int, b: int) -> None:
    if a != b:
        assert not (text_ids(a, 0, 16) == text_ids(b, 0, 16)).any()


def test_turns_of_a_session_share_their_prefix_and_follow_its_end() -> None:
    w = sessions_of(singles(4), turns=2, think=3.0, seed=1).with_columns(n_in=np.array([10, 25, 10, 25]))
    source = Requests(w)
    roots = list(source)
    assert [r.id for r in roots] == ["w0", "w2"] and len(source) == 4
    [more] = source.after(roots[0], now=50.0)
    assert more.id == "w1" and more.arrival == pytest.approx(50.0 + w.think[1])
    assert np.array_equal(more.prompt[:10], roots[0].prompt) and source.after(more, 60.0) == []


def test_recorded_replies_go_along_if_asked_for() -> None:
    w = Workload("r", np.zeros(1), n_in=[2], n_out=[3], ids=Ragged.of([[4, 5]], np.int32), replies=Ragged.of([[6, 7, 8]], np.int32))
    [plain], [told] = list(to_requests(w)), list(to_requests(w, replies=True))
    assert plain.extras == {} and told.extras["reply"].tolist() == [6, 7, 8] and told.prompt.tolist() == [4, 5]


def test_texts_get_lengths_and_ids() -> None:
    w = Workload("t", np.zeros(2), prompts=("hello", "you"), answers=("abc", ""))
    with pytest.raises(ConfigError, match="tokenise"):
        prompt_ids(w, 0)
    done = tokenised(w, Letters(), default=9)
    assert done.n_in.tolist() == [5, 3] and done.n_out.tolist() == [3, 9]
    assert real_ids(done, Letters())(0) == [ord(c) for c in "hello"]
    assert tokenised(w, Letters(), output_len=4).n_out.tolist() == [4, 4]


def test_turns_count_what_stands_in_front_of_them_and_long_ones_are_cut() -> None:
    w = Workload("t", np.array([0, math.nan, math.nan]), after=[-1, 0, 1], prompts=("aaaa", "bb", "c"), answers=("xy", "z", "zz"), grows=True)
    done = tokenised(w, Letters())
    assert done.n_in.tolist() == [4, 4 + 2 + 2, 8 + 1 + 1]
    assert len(within(done, 9)) == 2
    with pytest.raises(ConfigError, match="fits"):
        within(done, 3)


def test_made_up_ids_fit_a_vocabulary_and_equal_ones_stay_equal() -> None:
    allowed = np.arange(5, 100)
    ids = ids_in(allowed, text_ids(3, 0, 5000))
    assert ids.min() >= 5 and ids.max() < 100 and np.array_equal(ids, ids_in(allowed, text_ids(3, 0, 5000)))
    assert np.bincount(ids, minlength=100)[5:].min() > 20


def test_nothing_here_imports_torch() -> None:
    code = "import presage.bench.workloads, presage.bench.serving, presage.bench.sweep, presage.bench.page, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
