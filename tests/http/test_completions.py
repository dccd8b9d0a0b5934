"""/v1/completions through the official client."""

from __future__ import annotations

import httpx
import openai
import pytest

MODEL = "presage-tiny"


def test_text_comes_back(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="x SAY:hello, world", max_tokens=50)
    assert r.choices[0].text == "hello, world"
    assert r.choices[0].finish_reason == "stop"
    assert r.usage is not None and r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens
    assert r.id.startswith("cmpl-") and r.object == "text_completion"


def test_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="one two three")
    assert r.usage is not None and r.usage.completion_tokens == 16
    assert r.choices[0].finish_reason == "length"


def test_prompts_as_texts_and_ids(client: openai.OpenAI, url: str) -> None:
    ids = httpx.post(url + "/tokenize", json={"prompt": "x SAY:beta"}).json()["tokens"]
    by_text = client.completions.create(model=MODEL, prompt=["x SAY:alpha", "x SAY:beta"], max_tokens=20)
    assert [c.text for c in by_text.choices] == ["alpha", "beta"]
    assert [c.index for c in by_text.choices] == [0, 1]
    assert client.completions.create(model=MODEL, prompt=ids, max_tokens=20).choices[0].text == "beta"
    assert [c.text for c in client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=20).choices] == ["beta", "beta"]


def test_n_times_prompts_are_ordered(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt=["x SAY:a", "x SAY:b"], n=2, max_tokens=9)
    assert [(c.index, c.text) for c in r.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


@pytest.mark.parametrize("text", ["plain text", "Grüße, 你好 and 😀 emoji", "tabs\tand\nlines"])
def test_stream_adds_up_to_the_whole(client: openai.OpenAI, text: str) -> None:
    whole = client.completions.create(model=MODEL, prompt="x SAY:" + text, max_tokens=90).choices[0].text
    parts = list(client.completions.create(model=MODEL, prompt="x SAY:" + text, max_tokens=90, stream=True))
    assert "".join(p.choices[0].text for p in parts) == whole == text
    assert [p.choices[0].finish_reason for p in parts][-1] == "stop"
    assert "\ufffd" not in "".join(p.choices[0].text for p in parts)


def test_stop_string_is_held_back_and_cut(client: openai.OpenAI) -> None:
    args = {"model": MODEL, "prompt": "x SAY:one two three four", "max_tokens": 50, "stop": ["thre", "zzz"]}
    whole = client.completions.create(**args).choices[0]
    assert (whole.text, whole.finish_reason) == ("one two ", "stop")
    assert whole.model_extra is not None and whole.model_extra["stop_reason"] == "thre"
    parts = list(client.completions.create(**args, stream=True))
    assert "".join(p.choices[0].text for p in parts) == "one two "
    kept = client.completions.create(**args, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == "one two thre"


def test_stop_string_waits_for_min_tokens(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="x SAY:aa bb aa bb aa", stop="bb", max_tokens=50, extra_body={"min_tokens": 6})
    assert r.choices[0].text.count("bb") >= 1 or r.choices[0].finish_reason == "stop"
    short = client.completions.create(model=MODEL, prompt="x SAY:aa bb aa bb aa", stop="bb", max_tokens=50)
    assert short.choices[0].text == "aa " and len(r.choices[0].text) > len(short.choices[0].text)


def test_logprobs_shape(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="x SAY:abc def", max_tokens=20, logprobs=2)
    found = r.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    n = len(found.tokens)
    assert n == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == r.usage.completion_tokens  # type: ignore[union-attr]
    assert "".join(found.tokens[:-1]) == "abc def"
    assert found.text_offset[0] == 0 and found.text_offset[-1] == len("abc def")
    assert all(len(t) >= 2 for t in found.top_logprobs)


def test_stream_logprobs_equal_the_whole(client: openai.OpenAI) -> None:
    args = {"model": MODEL, "prompt": "x SAY:abc def", "max_tokens": 20, "logprobs": 1}
    whole = client.completions.create(**args).choices[0].logprobs
    parts = [p.choices[0].logprobs for p in client.completions.create(**args, stream=True)]
    assert whole is not None
    assert [t for p in parts if p for t in p.tokens or []] == whole.tokens
    assert [t for p in parts if p for t in p.text_offset or []] == whole.text_offset


def test_echo_with_logprobs_covers_the_prompt(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="x SAY:abc", max_tokens=20, logprobs=1, echo=True)
    assert r.choices[0].text == "x SAY:abcabc"
    found = r.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.token_logprobs[0] is None
    assert r.usage is not None and len(found.tokens or []) == r.usage.total_tokens


def test_scoring_without_generation(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="score me", max_tokens=0, logprobs=1, echo=True)
    assert r.choices[0].text == "score me"
    assert r.usage is not None and r.usage.completion_tokens == 0
    assert len(r.choices[0].logprobs.tokens or []) == r.usage.prompt_tokens  # type: ignore[union-attr]


def test_prompt_logprobs_and_token_ids(client: openai.OpenAI) -> None:
    r = client.completions.create(model=MODEL, prompt="x SAY:ab", max_tokens=9, extra_body={"prompt_logprobs": 1, "return_token_ids": True})
    extra = r.choices[0].model_extra or {}
    assert extra["prompt_logprobs"][0] is None
    assert len(extra["prompt_logprobs"]) == len(extra["prompt_token_ids"]) == r.usage.prompt_tokens  # type: ignore[union-attr]
    assert len(extra["token_ids"]) == r.usage.completion_tokens  # type: ignore[union-attr]


def test_usage_in_the_stream(client: openai.OpenAI) -> None:
    parts = list(client.completions.create(model=MODEL, prompt="x SAY:abc", max_tokens=9, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == [] and parts[-1].usage is not None and parts[-1].usage.completion_tokens > 0
    assert all(p.usage is None for p in parts[:-1])
    each = client.completions.create(
        model=MODEL, prompt="x SAY:abc def ghi", max_tokens=9, stream=True, extra_body={"stream_options": {"continuous_usage_stats": True}}
    )
    counts = [p.usage.completion_tokens for p in each if p.usage]
    assert counts == sorted(counts) and counts[-1] > counts[0] >= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("n", 0),
        ("n", 10**9),
        ("best_of", 3),
        ("suffix", "end"),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("logprobs", 1000),
        ("stop", ["x"] * 1000),
        ("stop_token_ids", [10**9]),
        ("allowed_token_ids", []),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"1": 1000}),
        ("bad_words", [""]),
        ("stream_options", {"include_usage": True}),
        ("structured_outputs", {"json": {}, "regex": "a"}),
        ("structured_outputs", {"nope": 1}),
        ("slo", {"ttft_ms": -1}),
        ("best_offf", 1),
        ("seed", 2**70),
    ],
)
def test_bad_values_name_the_field(url: str, field: str, value: object) -> None:
    r = httpx.post(url + "/v1/completions", json={"model": MODEL, "prompt": "hi", field: value})
    assert r.status_code == 400
    error = r.json()["error"]
    assert error["type"] == "invalid_request_error" and field in (error["param"] or "")


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [10**6], [-1], {"a": 1}, 5, None, [["a"]], ["a", 1]])
def test_bad_prompts(url: str, prompt: object) -> None:
    r = httpx.post(url + "/v1/completions", json={"prompt": prompt})
    assert r.status_code == 400 and (r.json()["error"]["param"] or "").startswith("prompt")


def test_too_long_prompt_gives_both_counts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 3000)
    assert caught.value.code == "context_length_exceeded"
    body = caught.value.body
    assert isinstance(body, dict) and (body["n_prompt_tokens"], body["n_ctx"]) == (3000, 2048)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[5] * 2000, max_tokens=100)


@pytest.mark.parametrize("field", [{"draft": {"method": "ngram"}}, {"thinking_budget": 12}])
def test_what_this_server_cannot_do_is_refused(client: openai.OpenAI, field: dict[str, object]) -> None:
    """No drafter is configured, and the bundled model has no end-of-thinking token: saying so beats ignoring the wish."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x SAY:hi", extra_body=field)
    assert caught.value.param == next(iter(field))


def test_request_fields_reach_the_engine(client: openai.OpenAI, engine: object) -> None:
    extra = {
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "priority": -3,
        "slo": {"ttft_ms": 500, "tpot_ms": 50, "e2e_ms": 9000},
        "program_id": "p1",
        "stage": "s1",
        "cache_salt": "salty",
        "draft": {"method": "none"},
        "bad_words": ["foo"],
        "guided_regex": "a+",
    }
    client.completions.create(model=MODEL, prompt="x SAY:hi", seed=5, extra_body=extra)
    seen = getattr(engine, "seen", None)
    if seen is None:
        pytest.skip("this engine does not show its requests")
    r = seen[-1]
    s = r.sampling
    assert (s.top_k, s.min_p, s.repetition_penalty, s.seed) == (7, 0.1, 1.1, 5)
    assert s.structured_outputs.regex == "a+" and s.bad_words_ids
    assert (r.priority, r.program, r.stage, r.draft["method"]) == (-3, "p1", "s1", "none")
    assert r.salt != b"" and 0 < r.due_first - r.arrival < 0.51 and r.due_each == 0.05 and r.due_end > r.due_first
