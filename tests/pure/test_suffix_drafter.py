"""The suffix drafter's life: fork, rewind, close, namespaces, eviction, rebuilding, and its memory on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from presage.core.errors import CheckpointError, ConfigError, RequestError
from presage.core.plan import Draft
from presage.core.request import Request
from presage.core.salt import salt_of
from presage.draft import suffix_tree as k
from presage.draft.registry import make_drafter
from presage.draft.suffix import SuffixDrafter
from presage.draft.suffix_draft import GROOT, ROOT
from tests.pure.test_suffix_drafts import new_ids
from tests.pure.test_suffix_tree import brute_counts, children

TEXT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def request(name: str, prompt: list[int], **more: object) -> Request:
    return Request(id=name, prompt=np.array(prompt, np.int32), **more)  # type: ignore[arg-type]


def run(d: SuffixDrafter, slot: int, output: list[int], prompt: list[int] | None = None, **more: object) -> None:
    """A whole request."""
    d.open(slot, request("past", prompt or [1], **more))
    d.advance(new_ids({slot: output}))
    d.close(slot)


def drafts(d: SuffixDrafter, *slots: int, budget: int = 8) -> list[list[int]]:
    out: Draft = d.draft(np.array(slots, np.int32), np.full(len(slots), budget, np.int32))
    return [out.token[a:b].tolist() for a, b in zip(out.offset[:-1], out.offset[1:], strict=True)]


def held(d: SuffixDrafter) -> tuple[int, int]:
    """Live states and edges once all finished requests' own trees are gone."""
    while d._doomed:
        d.advance(new_ids({0: []}))
    return int(d.forest.ctl[k.STATES]), int(d.forest.ctl[k.EDGES])


def test_registered_and_learns_across_requests() -> None:
    d = make_drafter("suffix", {"num_speculative_tokens": 4, "suffix_decoding_max_tree_depth": 12})
    assert isinstance(d, SuffixDrafter)
    run(d, 0, TEXT)
    d.open(0, request("new", [1, 2]))
    d.advance(new_ids({0: TEXT[:3]}))
    assert drafts(d, 0) == [[8, 9, 10]]
    assert set(d.draft(np.array([0], np.int32), np.array([4], np.int32)).source.tolist()) == {1}


def test_namespaces_are_kept_apart() -> None:
    d = SuffixDrafter(8, 16)
    same = {"model": "m", "adapter": None, "tenant": "a", "salt": b"s"}
    run(d, 0, TEXT, **same)
    for slot, other in enumerate(({}, {"model": "n"}, {"adapter": "lora"}, {"tenant": "b"}, {"salt": b"t"})):
        # Each of its own: one that was let in would see the one before, too.
        d.open(slot, request("new", [1, 2], **(same | other)))
        d.advance(new_ids({slot: TEXT[:3]}))
    assert drafts(d, 0, 1, 2, 3, 4) == [[8, 9, 10], [], [], [], []]


def test_rewind_forgets_what_came_after() -> None:
    d, fresh = SuffixDrafter(8, 8), SuffixDrafter(8, 8)
    for one, output in ((d, [3, 4, 9, 3, 4, 9, 3, 4]), (fresh, [3])):
        one.open(0, request("x", [1, 2, 1, 2]))
        one.advance(new_ids({0: output}))
    d.rewind(0, 5)
    for tree in d.seat[0, [ROOT, GROOT]].tolist():
        assert [d.forest.count(tree, np.array(x, np.int32)) for x in ([3], [3, 4], [4])] == [1, 0, 0]
    for one in (d, fresh):
        one.advance(new_ids({0: [1]}))
    assert drafts(d, 0) == drafts(fresh, 0) == [[2]]
    d.rewind(0, 2)
    d.advance(new_ids({0: [1]}))
    assert drafts(d, 0) == [[2]]


def test_fork_copies_and_then_goes_its_own_way() -> None:
    d = SuffixDrafter(8, 16, 0)
    d.open(0, request("x", [1, 2, 3, 4, 5]))
    d.advance(new_ids({0: [1, 2]}))
    d.open(1, request("y", [1, 2, 3, 4, 5]))
    d.fork(0, 1, request("y", [1, 2, 3, 4, 5]))
    d.advance(new_ids({0: [3], 1: []}))
    assert drafts(d, 0, 1) == [[4, 5, 1], [3, 4]]
    d.advance(new_ids({1: [9]}))
    counts = [[d.forest.count(int(d.seat[slot, ROOT]), np.array(x, np.int32)) for x in ([1, 2], [2, 3], [2, 9])] for slot in (0, 1)]
    assert counts == [[2, 2, 0], [2, 1, 1]]
    d.close(0)
    d.close(1)
    assert held(d) == (1, 0)


def test_closing_everything_and_evicting_returns_all_memory() -> None:
    d = SuffixDrafter(8, 16, 1)
    rng = np.random.default_rng(0)
    for i in range(6):
        run(d, i % 2, rng.integers(0, 9, 50).tolist(), rng.integers(0, 9, 30).tolist())
    run(d, 0, [7])
    assert d.stats()["responses"] == 1
    assert held(d) == (3, 0)  # nobody's state, the shared root and the string "7"


@pytest.mark.parametrize("eviction, survivor", [("fifo", 1), ("lru", 0)])
def test_eviction_order(eviction: str, survivor: int) -> None:
    texts = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35]]
    d = SuffixDrafter(8, 16, 3, suffix_decoding_eviction=eviction)
    run(d, 0, texts[0])
    run(d, 0, texts[1])
    d.open(0, request("uses the first", [1]))
    d.advance(new_ids({0: texts[0][:3]}))
    assert drafts(d, 0) == [texts[0][3:]]
    d.advance(new_ids({0: [*texts[0][3:], 40]}))
    d.rewind(0, 1)
    d.close(0)  # its own response is empty now and not kept
    run(d, 0, texts[2])
    run(d, 0, [50])
    held(d)
    counts = [d.forest.count(d.library.root(("", "", "", "")), np.array(t[:4], np.int32)) for t in texts[:2]]
    assert counts.index(1) == survivor and sum(counts) == 1


def test_token_limit_evicts_oldest_but_not_the_running_request() -> None:
    d = SuffixDrafter(8, 8, -1, 25)
    for i in range(4):
        run(d, 0, list(range(10 * i, 10 * i + 10)))
    assert (d.stats()["responses"], d.stats()["tokens"]) == (2, 20)


def test_request_evicted_while_running_keeps_its_own_text() -> None:
    d = SuffixDrafter(8, 8, 1)
    d.open(0, request("old", [1, 2, 3]))
    d.advance(new_ids({0: [4, 5, 6, 4, 5]}))
    d.open(1, request("new", [9]))
    assert drafts(d, 0) == [[6, 4]]
    d.advance(new_ids({0: [6], 1: [8]}))
    d.close(0)
    assert d.stats()["responses"] == 1


def test_long_prompts_are_indexed_by_quota() -> None:
    d = SuffixDrafter(4, 8)
    d.quota = 10
    prompt = [int(x) for x in np.arange(24)]
    d.open(0, request("long", [*prompt, 0, 1]))
    d.advance(new_ids({0: [2]}))
    assert (int(d.done[0]), drafts(d, 0)) == (10, [[]])
    d.advance(new_ids({0: []}))
    d.advance(new_ids({0: []}))
    assert drafts(d, 0) == [[3, 4, 5]]


def test_full_pools_grow_while_a_request_runs() -> None:
    d = SuffixDrafter(4, 8)
    states, text = len(d.forest.S), list(range(10, 6010))
    d.open(0, request("long", [1]))
    for at in range(0, len(text), 500):
        d.advance(new_ids({0: text[at : at + 500]}))
        assert d.done[0] == d.length[0]
    assert len(d.forest.S) > states
    d.advance(new_ids({0: text[:3]}))
    assert drafts(d, 0) == [text[3:6]]


def test_rebuilding_changes_no_draft() -> None:
    d = SuffixDrafter(8, 12)
    rng = np.random.default_rng(1)
    for _ in range(5):
        run(d, 0, rng.integers(0, 3, 60).tolist())
    for slot in (0, 3):
        d.open(slot, request("x", rng.integers(0, 3, 20).tolist()))
    d.advance(new_ids({0: [0, 1, 2, 0], 3: [2, 2]}))
    while d._doomed:
        d.advance(new_ids({0: []}))
    before, size = drafts(d, 0, 3), int(d.forest.ctl[k.STATES])
    d._rebuild()
    assert drafts(d, 0, 3) == before
    assert int(d.forest.ctl[k.STATES]) <= size
    d.advance(new_ids({0: [1], 3: [0]}))
    d.close(0)
    assert drafts(d, 3)


def test_memory_on_disk(tmp_path: Path) -> None:
    d, other = SuffixDrafter(8, 16), SuffixDrafter(8, 16)
    run(d, 0, TEXT)
    run(d, 0, TEXT[::-1], tenant="b")
    path = tmp_path / "suffix.bin"
    assert d.store(path, "tiny") == 2
    assert other.restore(path, "tiny") == 2
    for one in (d, other):
        one.open(0, request("new", [1]))
        one.advance(new_ids({0: TEXT[:4]}))
    assert drafts(d, 0) == drafts(other, 0) == [[9, 10, 11, 12]]
    for one in (d, other):
        one.open(1, request("new", [1], tenant="b"))
        one.advance(new_ids({1: TEXT[:2]}))
        assert drafts(one, 1) == [[5]]  # 7, 8 is what the other tenant has
        one.advance(new_ids({1: TEXT[::-1][:2]}))
        assert drafts(one, 1) == [[12, 11]]
    assert other.stats()["tokens"] == 20


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    d = SuffixDrafter(8, 16)
    run(d, 0, TEXT)
    path = tmp_path / "suffix.bin"
    d.store(path, "tiny")
    good = path.read_bytes()
    with pytest.raises(CheckpointError, match="other"):
        d.restore(path, "other")
    for bad in (good[:-1], good[:40] + b"x" + good[41:], b"", b"x" * 100):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="damaged"):
            d.restore(path, "tiny")
    with pytest.raises(CheckpointError, match=r"missing\.bin"):
        d.restore(tmp_path / "missing.bin", "tiny")
    assert d.stats()["tokens"] == len(TEXT)


def test_warm_up_from_past_outputs(tmp_path: Path) -> None:
    path = tmp_path / "past.jsonl"
    rows = [{"token_ids": TEXT}, {"output": "abc", "tenant": "t"}]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    d = SuffixDrafter(8, 16)
    assert d.warm_up(path, lambda text: [ord(c) for c in text]) == 2
    d.open(0, request("new", [1]))
    d.advance(new_ids({0: TEXT[:2]}))
    assert drafts(d, 0) == [[7, 8]]
    for slot, tenant, found in ((1, "t", [ord("c")]), (2, "", [])):
        d.open(slot, request("new", [1], tenant=tenant, salt=salt_of(tenant, None)))
        d.advance(new_ids({slot: [ord("a"), ord("b")]}))
        assert drafts(d, slot) == [found]
    with pytest.raises(ConfigError, match="line 2"):
        d.warm_up(path)
    path.write_text('{"token_ids": [1, -2]}', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        d.warm_up(path)


def test_warm_up_as_a_setting(tmp_path: Path) -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text] + [0] * add_special_tokens

    path = tmp_path / "past.jsonl"
    path.write_text('{"response": "abcdef"}', encoding="utf-8")
    setting = {"num_speculative_tokens": 8, "suffix_decoding_warm_up": str(path)}
    d = make_drafter("suffix", setting, tokenizer=Letters(), vocab_size=128)
    assert isinstance(d, SuffixDrafter)
    d.open(0, request("new", [1]))
    d.advance(new_ids({0: [ord("b"), ord("c"), ord("d")]}))
    assert drafts(d, 0) == [[ord("e"), ord("f")]]
    with pytest.raises(ConfigError, match="tokenizer"):
        make_drafter("suffix", setting)
    with pytest.raises(ConfigError, match="id 102, the vocabulary has 100"):
        make_drafter("suffix", setting, tokenizer=Letters(), vocab_size=100)


@pytest.mark.parametrize("seed", range(8))
def test_counts_after_any_life(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = SuffixDrafter(4, 6, 4, suffix_decoding_eviction="lru" if seed % 2 else "fifo")
    d.quota = 40
    live: dict[int, list[int]] = {}
    for step in range(150):
        slot, ids = int(rng.integers(0, 10)), rng.integers(0, 3, int(rng.integers(0, 15))).tolist()
        what = rng.integers(0, 8)
        if slot not in live:
            live[slot] = [*ids, 1]
            d.open(slot, request(f"{step}", live[slot]))
        elif what == 0:
            d.close(slot)
            del live[slot]
        elif what == 1:
            del live[slot][int(rng.integers(1, len(live[slot]) + 1)) :]
            d.rewind(slot, len(live[slot]))
        elif what == 2 and len(live) > 1:
            src = next(s for s in live if s != slot)
            d.fork(src, slot, request(f"{step}", live[src]))
            live[slot] = list(live[src])
        elif what == 3:
            d._rebuild() if not d._doomed else held(d)
        else:
            d.advance(new_ids({s: (ids if s == slot else [2]) for s in live}))
            for s in live:
                live[s] += ids if s == slot else [2]
            d.draft(np.array(list(live), np.int32), np.full(len(live), 4, np.int32))
    held(d)
    while (d.done < d.length).any():
        d.advance(new_ids({s: [] for s in live}))
    for slot, known in live.items():
        check(d, int(d.seat[slot, ROOT]), [known])
    stored = [e.ids.tolist() if e.slot < 0 else d._response(e.slot).tolist() for e in d.library.entries.values()]
    check(d, d.library.root(("", "", "", "")), stored)
    assert len(d.library.entries) <= 4


def check(d: SuffixDrafter, root: int, sequences: list[list[int]]) -> None:
    counts = brute_counts(sequences, d.forest.depth)
    assert all(d.forest.count(root, np.array(x, np.int32)) == n for x, n in counts.items())
    for x in counts:
        assert (d.forest.count(root, np.array([*x, 3], np.int32)) if len(x) < d.forest.depth else 0) == 0
    assert sum(int(d.forest.S[u, k.COUNT]) for u in children(d.forest, root)) == sum(map(len, sequences))


def test_a_bad_override_leaves_no_trace() -> None:
    d = SuffixDrafter(8, 16)
    for bad in ({"suffix_decoding_max_spec_factor": "x"}, {"suffix_decoding_min_token_prob": -1}):
        with pytest.raises(RequestError):
            d.open(0, request("bad", [1, 2], draft=bad))
    assert d.stats()["responses"] == 0
    assert held(d) == (1, 0)


@pytest.mark.parametrize("setting", [{"suffix_decoding_eviction": "random"}, {"suffix_decoding_min_token_prob": 2.0}, {"num_speculative_tokens": 0}])
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ConfigError):
        SuffixDrafter(**setting)
