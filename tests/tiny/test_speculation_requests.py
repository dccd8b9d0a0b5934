"""Speculation as a request and an operator meet it: load, opt-out, caps, budgets, aborts, rules that refuse, settings that are wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest

from presage.core.errors import ConfigError, RequestError, StepFailed
from tests.tiny.speculation_work import (
    CALLS,
    CLASS,
    GREEDY,
    LENGTHS,
    LINES,
    LOOK_UPS,
    SAMPLED,
    Nodes,
    answers,
    collect,
    engine,
    expected,
    idle,
    params,
    send,
)

FIXED = LENGTHS["fixed"]


@pytest.mark.parametrize("name", ["suffix tree", "merged"])
def test_sampled_tokens_do_not_depend_on_load(name: str) -> None:
    llm = engine({**LOOK_UPS[name], "length": FIXED})
    want, _ = expected(True)
    for i, one in enumerate(SAMPLED, len(GREEDY)):  # alone, with drafters that know little; then all at once, with what these taught them
        assert answers(llm, [one]) == [want[i]]
    assert answers(llm, SAMPLED * 2 + GREEDY) == want[len(GREEDY) :] * 2 + want[: len(GREEDY)]
    assert llm.stats()["spec_num_accepted_tokens"] > 20
    idle(llm)
    llm.close()


@pytest.mark.parametrize("policy", ["fixed", "marginal", "goodput"])
@pytest.mark.parametrize("name", ["suffix tree", "ngram", "lookahead tree", "merged"])
def test_requests_opt_out_or_cap_their_drafts(name: str, policy: str) -> None:
    llm = engine({**LOOK_UPS[name], "length": policy})
    nodes = llm.engine.loop.log = Nodes()
    wishes = {"free": None, "none": {"method": "none"}, "zero": {"num_speculative_tokens": 0}, "two": {"num_speculative_tokens": 2}}
    sampling = params(max_tokens=48)
    out = collect(llm, [send(llm, LINES, sampling, name, draft=wish) for name, wish in wishes.items()])
    assert len({tuple(ids) for ids in out.values()}) == 1
    assert nodes.most("none") == nodes.most("zero") == 0
    assert nodes.most("two") <= 2
    if policy == "fixed":
        assert nodes.most("two") > 0 and nodes.most("free") > 2
    idle(llm)
    llm.close()


def test_a_malformed_wish_refuses_that_request_only() -> None:
    llm = engine(LOOK_UPS["merged"])
    for wrong in ("many", -1, 2.5):
        error = collect(llm, [send(llm, LINES, params(), "bad", draft={"num_speculative_tokens": wrong})])["bad"]
        assert isinstance(error, RequestError) and "num_speculative_tokens" in error.message
    assert len(answers(llm, GREEDY[:1])[0][0][0]) == 64
    idle(llm)
    llm.close()


def test_a_refused_request_beside_more_than_the_drafter_has_seen() -> None:
    """The ninth slot is one that the drafter has no columns for yet: its refusal takes nobody else along."""
    llm = engine({"method": "suffix"})
    work = [send(llm, LINES, params(), f"r{i}") for i in range(8)]
    work.append(send(llm, LINES, params(), "bad", draft={"suffix_decoding_max_spec_factor": "x"}))
    out = collect(llm, work)
    assert isinstance(out.pop("bad"), RequestError)
    assert len(out) == 8 and all(isinstance(ids, list) for ids in out.values())
    idle(llm)
    llm.close()


def test_drafts_of_a_step_stay_within_the_budget() -> None:
    llm = engine({"method": "ngram", "prompt_lookup_min": 1, "length": FIXED}, max_draft_tokens=5)
    nodes = llm.engine.loop.log = Nodes()
    answers(llm, [(CALLS, params()), (LINES, params()), (CLASS, params())])
    assert max(sum(step.values()) for step in nodes.steps) == 5
    assert any(sum(n > 0 for n in step.values()) > 1 for step in nodes.steps)
    llm.close()
    off = engine({"method": "ngram"}, max_draft_tokens=0)
    assert off.engine.loop.drafter is None
    off.close()


def test_aborted_requests_leave_nothing_behind() -> None:
    llm = engine({**LOOK_UPS["merged"], "length": FIXED})
    left = [send(llm, p, s, f"r{i}") for i, (p, s) in enumerate(GREEDY)]
    for _ in range(8):
        llm.engine.driver.step()
    while left:
        llm.engine.abort(left.pop().id)
        llm.engine.driver.step()
    idle(llm)
    llm.close()


def test_the_greedy_rule_refuses_sampling_but_serves_the_rest() -> None:
    llm = engine({**LOOK_UPS["suffix chain"], "rule": "greedy", "length": FIXED})
    want, _ = expected(False)
    out = collect(llm, [send(llm, LINES, params(temperature=1.0), "hot"), send(llm, *GREEDY[0], "cold")])
    assert isinstance(out["hot"], StepFailed) and "use keyed" in out["hot"].message
    assert out["cold"] == want[0][0][0]
    idle(llm)
    llm.close()


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{suffix}", "no JSON"),
    "a list": ("[1]", "JSON object"),
    "a number": (7, "speculative_config"),
    "no method": ({"num_speculative_tokens": 4}, "method"),
    "method is a number": ({"method": 3}, "method"),
    "unknown method": ({"method": "oracle"}, "known: .*suffix"),
    "unknown setting": ({"method": "suffix", "tree_width": 3}, "tree_width.*known: .*suffix_decoding_tree"),
    "negative count": ({"method": "suffix", "num_speculative_tokens": -1}, "num_speculative_tokens"),
    "ngram sizes": ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 2}, "prompt_lookup_min"),
    "lookahead length": ({"method": "lookahead", "branch_length": 0}, "branch_length"),
    "suffix depth": ({"method": "suffix", "suffix_decoding_max_tree_depth": -3}, "depth of a suffix tree"),
    "suffix eviction": ({"method": "suffix", "suffix_decoding_eviction": "random"}, "eviction must be"),
    "hybrid of nothing": ({"method": "hybrid", "drafters": []}, "drafter"),
    "hybrid without drafters": ({"method": "hybrid"}, "drafters"),
    "hybrid's combine": ({"method": "hybrid", "drafters": [{"method": "suffix"}], "combine": "xor"}, "combine"),
    "unknown length": ({"method": "suffix", "length": "psychic"}, "psychic"),
    "length without policy": ({"method": "suffix", "length": {"k": 3}}, "policy"),
    "unknown option of a length": ({"method": "suffix", "length": {"policy": "fixed", "k": 3}}, "k"),
    "length table": ({"method": "suffix", "length": {"policy": "fixed", "table": [[1, 2]]}}, "table"),
    "unknown rule": ({"method": "suffix", "rule": "hope"}, "keyed"),
    "rule is an object": ({"method": "suffix", "rule": {"name": "keyed"}}, "rule"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_with_a_reason(case: str) -> None:
    value, reason = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        engine(value)
    assert re.search(reason, f"{refused.value.param}: {refused.value.message}")
