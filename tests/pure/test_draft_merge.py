"""Merged drafts are the union of paths and stay exact under rejection; a hybrid drives its parts; drafters are found by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import ConfigError, RequestError
from presage.core.plan import Draft, StepDone
from presage.core.types import EMPTY
from presage.draft import registry
from presage.draft.hybrid import HybridDrafter
from presage.draft.lookahead import LookaheadDrafter
from presage.draft.merge import merge
from presage.draft.ngram import NgramDrafter
from presage.draft.registry import make_drafter
from presage.draft.sources import SOURCES, code_of
from presage.engine.null import NullExecutor, null_geometry
from presage.verify.kit import draft_of, plan_of
from presage.verify.rejection import Rejection
from tests.pure.branches import Branches, Trials, all_drafts, distance
from tests.pure.drafts import check, committed, grants, own, paths, request
from tests.pure.loops import Bench
from tests.pure.test_loop import AllIn
from tests.pure.test_verify_exact import proposal, world


def random_draft(rng: Any, grants: int, source: int) -> Draft:
    """Trees of up to 8 nodes with probabilities that never rise."""
    trees = []
    for _ in range(grants):
        tree: list[tuple[int, int]] = []
        for _ in range(int(rng.integers(0, 9))):
            node = int(rng.integers(0, 3)), int(rng.integers(-1, len(tree)))
            if node not in tree:
                tree.append(node)
        trees.append(tree)
    out = draft_of(trees)
    out.source = np.full(len(out), source, np.uint8)
    for g in range(grants):
        for i in range(int(out.offset[g]), int(out.offset[g + 1])):
            above = out.prob[out.offset[g] + out.parent[i]] if out.parent[i] >= 0 else 1.0
            out.prob[i] = above * rng.choice([0.5, 0.9, 1.0])
    return out


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 4), n=st.integers(1, 4))
def test_union_of_paths_with_the_highest_probability(seed: int, parts: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    drafts = [random_draft(rng, n, d + 1) for d in range(parts)]
    merged, budget = merge(drafts), rng.integers(0, 12, n).astype(np.int32)
    cut = merge(drafts, budget)
    check(merged, [99] * n)
    check(cut, budget.tolist())
    for g in range(n):
        want: dict[tuple[int, ...], tuple[float, int]] = {}
        for d, draft in enumerate(drafts):
            for path, p in paths(draft, g).items():
                if path not in want or p > want[path][0]:
                    want[path] = p, d + 1
        a, b = merged.offset[g], merged.offset[g + 1]
        assert paths(merged, g) == {path: p for path, (p, _) in want.items()}
        assert dict(zip(paths(merged, g), merged.source[a:b].tolist(), strict=True)) == {path: d for path, (_, d) in want.items()}
        kept = sorted(paths(cut, g).values(), reverse=True)
        assert kept == sorted((p for p, _ in want.values()), reverse=True)[: budget[g]]
    assert not len(merged.trial_node) and merged.q is None


def test_trials_follow_their_nodes_sampled_ones_first() -> None:
    points = draft_of([[(1, -1), (2, 0)], [(3, -1)]])
    sampled = draft_of([[(1, -1), (5, 0)], []])
    sampled.trial_node, sampled.trial_q, sampled.q = np.array([0, 0, 1], np.int32), np.array([0, 0, 1], np.int32), np.eye(2, 6)
    more = draft_of([[(9, -1)], [(3, -1)]])
    more.trial_node, more.trial_q, more.q = np.array([0, 1], np.int32), np.array([0, 1], np.int32), np.eye(2, 6, 2)
    merged = merge([points, sampled, more])
    assert [own(merged, g) for g in range(2)] == [[(1, -1), (2, 0), (5, 0), (9, -1)], [(3, -1)]]
    assert merged.trial_node.tolist() == [0, 0, 2, 3, 4, 0, 1, 4]
    assert merged.trial_q.tolist() == [0, 0, 1, 2, 3, -1, -1, -1]
    np.testing.assert_array_equal(merged.q, np.concatenate([np.eye(2, 6), np.eye(2, 6, 2)]))
    cut = merge([points, sampled, more], np.array([3, 1], np.int32))
    assert own(cut, 0) == [(1, -1), (5, 0), (9, -1)] and cut.trial_node.tolist() == [0, 0, 1, 2, 3, 0, 3]


def sampled_and_points(seed: int, budget: int):
    """A sampled chain of two merged with fixed branches, cut to a budget: what a hybrid under load proposes."""

    def made() -> list[tuple[float, Draft]]:
        def chain(b: Branches, t: Trials) -> None:
            path, node = (), -1
            for _ in range(2):
                q = proposal(seed, path)
                token = b.pick(q.tolist())
                node, path = t.add(token, node, t.row(q)), (*path, token)

        points = draft_of([[(0, -1), (1, -1), (2, 0), (0, 1)]])
        points.prob = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
        return [(p, merge([d, points], np.array([budget], np.int32))) for p, d in all_drafts(chain)]

    return made()


@pytest.mark.parametrize("budget", [2, 3, 4, 6])
def test_merged_and_cut_drafts_stay_exact_under_rejection(budget: int) -> None:
    """Point masses are dropped depending on what was sampled, which is exact only because they are judged last."""
    for seed in range(3):
        w = world(seed + 30)
        drafts = sampled_and_points(seed, budget)
        assert all(len(d) <= budget for _, d in drafts)
        assert distance(w.law(Rejection(), drafts, 3), w.target_law(3)) < 1e-12


class Passes:
    """A drafter that runs two passes of its own and proposes a chain of what they returned; it notes what it was told."""

    def __init__(self, name: str = "p") -> None:
        self.name, self.told, self.asked = name, list[tuple[Any, ...]](), list[list[int]]()

    def __getattr__(self, verb: str) -> Any:
        if verb not in ("open", "advance", "rewind", "fork", "load", "close"):
            raise AttributeError(verb)
        return lambda *args: self.told.append((verb, *args))

    def save(self, slot: int) -> bytes | None:
        return None if self.name == "silent" else f"{self.name}{slot}".encode()

    def hint(self, view: Any) -> Any:
        return np.array([2, 2, 0], np.int32)

    def propose(self, view: Any, g: Any) -> Any:
        self.asked.append(g.draft.tolist())
        chains: list[list[int]] = [[] for _ in range(len(g))]
        for _ in range(2):
            done = yield plan_of(g.slot.tolist(), [1] * len(g))
            for i, chain in enumerate(chains):
                chain += done.new[done.new_off[i] : done.new_off[i + 1]].tolist()
        return Draft.chains([c[:most] for c, most in zip(chains, g.draft.tolist(), strict=True)])


def driven(drafter: Any, g: Any, view: Any = None) -> tuple[Draft, int]:
    """The draft of a drafter whose every pass answers 70, 71, ... for each span; and how many passes it ran."""
    run, passes = drafter.propose(view, g), 0
    try:
        plan = next(run)
        while True:
            n = plan.spans
            answer = np.full(n, 70 + passes, np.int32)
            plan = run.send(StepDone(0, 0.0, 0.0, np.arange(n + 1, dtype=np.int32), answer, EMPTY, EMPTY))
            passes += 1
    except StopIteration as stop:
        return stop.value, passes + 1 if passes else 0


def lookup() -> NgramDrafter:
    """Sure of slot 0, nothing for slots 1 and 2."""
    drafter = NgramDrafter(4)
    drafter.open(0, request("0", [1, 2, 3, 4, 5, 1, 2, 3]))
    drafter.open(1, request("1", [1, 2, 3]))
    drafter.open(2, request("2", [4, 5]))
    drafter.advance(committed({0: [4], 1: [9], 2: [6]}))
    return drafter


def test_hybrid_merges_and_forwards_passes() -> None:
    model = Passes()
    hybrid = HybridDrafter([model, lookup()])
    hybrid._hints = (np.array([2, 2, 0], np.int32), np.array([4, 0, 0], np.int32))
    draft, passes = driven(hybrid, grants([0, 1, 2], [6, 1, 3]))
    assert passes == 2 and model.asked == [[2, 1, 0]] and not hybrid.host
    assert own(draft, 0) == [(70, -1), (71, 0), (5, -1), (1, 2), (2, 3), (3, 4)]
    assert own(draft, 1) == [(70, -1)] and own(draft, 2) == []
    assert draft.source.tolist() == [0, 0] + [code_of("ngram")] * 4 + [0]


def test_hybrid_by_threshold_runs_the_model_only_where_needed() -> None:
    for tau, asked in ((0.0, []), (1.0, [[3, 3]]), (99.0, [[3, 3, 3]])):
        model = Passes()
        draft, passes = driven(HybridDrafter([lookup(), model], "threshold", tau), grants([0, 1, 2], [3, 3, 3]))
        assert model.asked == asked and passes == (2 if asked else 0)
        tokens = [[t for t, _ in own(draft, g)] for g in range(3)]
        assert tokens[0] == ([70, 71] if tau == 99 else [5, 1, 2])
        assert tokens[1:] == ([[], []] if tau == 0 else [[70, 71], [70, 71]])


def test_hybrid_hints() -> None:
    view: Any = type("View", (), {"known": np.array([9, 4, 3], np.int32), "ready": np.arange(3)})()
    parts = [lookup(), Passes()]
    assert parts[0].hint(view).tolist() == [4, 0, 0]
    assert HybridDrafter(parts).hint(view).tolist() == [6, 2, 0]
    assert HybridDrafter(parts, "threshold").hint(view).tolist() == [4, 2, 0]
    view.known = view.known + 1  # a result is in flight: nobody can know yet
    assert parts[0].hint(view).tolist() == [4, 4, 4]


def test_hybrid_routes_every_verb() -> None:
    parts = [Passes("a"), Passes("silent"), Passes("c")]
    hybrid, req, new = HybridDrafter(parts), request("r", [1]), committed({0: [1]})
    hybrid.open(4, req)
    hybrid.advance(new)
    hybrid.rewind(4, 1)
    hybrid.fork(4, 5, req)
    blob = hybrid.save(4)
    assert blob is not None and HybridDrafter([Passes("silent")]).save(4) is None
    hybrid.load(6, blob)
    hybrid.close(4)
    shared = [("open", 4, req), ("advance", new), ("rewind", 4, 1), ("fork", 4, 5, req)]
    assert [p.told for p in parts] == [
        [*shared, ("load", 6, b"a4"), ("close", 4)],
        [*shared, ("close", 4)],
        [*shared, ("load", 6, b"c4"), ("close", 4)],
    ]


def test_a_refused_request_leaves_no_trace_in_a_hybrid() -> None:
    good, bad = Passes(), NgramDrafter()
    with pytest.raises(RequestError, match="many"):
        HybridDrafter([good, bad]).open(0, request("r", [1], draft={"num_speculative_tokens": "many"}))
    assert [t[0] for t in good.told] == ["open", "close"]


@pytest.mark.parametrize("combine", ["merge", "threshold"])
def test_the_loop_gives_the_same_ids_with_a_hybrid(combine: str) -> None:
    rule = lambda slot, position: 10 + position % 7  # noqa: E731
    out = []
    for drafter in (None, HybridDrafter([NgramDrafter(5), LookaheadDrafter(5)], combine)):
        kw = {"drafter": drafter, "length": AllIn(), "max_drafts": 40} if drafter else {}
        b = Bench(128, executor=NullExecutor(null_geometry(128), rule=rule), max_num_batched_tokens=64, **kw)
        for i in range(4):
            b.add(f"r{i}", 20 + 9 * i, max_tokens=40)
        b.drain()
        out.append([b.output(f"r{i}") for i in range(4)])
        assert b.loop.stats["policy_errors"] == 0 and (drafter is None or b.loop.stats["accepted"] > 80)
    assert out[0] == out[1]


def test_make_drafter_by_name() -> None:
    assert make_drafter("ngram", {"num_speculative_tokens": 3, "prompt_lookup_max": 4}).high == 4
    assert isinstance(make_drafter("[ngram]", {"method": "[ngram]"}, vocab_size=10), NgramDrafter)
    parts = ["ngram", {"method": "lookahead", "branch_length": 3, "num_speculative_tokens": 20}]
    hybrid = make_drafter("hybrid", {"drafters": parts, "tau": 2.0, "num_speculative_tokens": 5})
    assert [d.num_speculative_tokens for d in hybrid.drafters] == [5, 20]
    assert isinstance(hybrid.drafters[1], LookaheadDrafter) and hybrid.drafters[1].branch_length == 3 and hybrid.host
    assert {"suffix", "ngram", "lookahead", "model", "early_exit", "hybrid"} <= set(registry.names())
    assert {"suffix", "ngram", "lookahead", "model", "early_exit"} <= set(SOURCES)


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("no_such", {}, "known:"),
        ("ngram", {"prompt_lookup_mix": 3}, "prompt_lookup_mix"),
        ("hybrid", {"drafters": [{"tau": 1}]}, "needs a method"),
        ("hybrid", {"drafters": []}, "at least one"),
        ("hybrid", {"drafters": [{"method": "ngram"}], "combine": "threshold"}, "two drafters"),
        ("hybrid", {"drafters": [{"method": "ngram"}], "combine": "both"}, "merge or threshold"),
        ("hybrid", {}, "needs drafters"),
    ],
)
def test_wrong_configurations_are_named(method: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_drafter(method, config)


def test_plug_ins_are_found_and_missing_modules_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plug = EntryPoint("mine", "presage.draft.ngram:NgramDrafter", registry.GROUP)
    broken = EntryPoint("gone", "no_such_module_at_all:X", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plug, broken] if group == "presage.drafters" else [])
    assert "mine" in registry.names() and isinstance(make_drafter("mine", {}), NgramDrafter)
    with pytest.raises(ConfigError, match="not part of this installation"):
        make_drafter("gone")
