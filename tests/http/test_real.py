"""The same server in front of the real engine and the bundled model: what a client sees must hold whatever the model says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from presage.serve.protocol import chat, completions, other
from tests.http.server import eventually, served

pytest.importorskip("torch")
MODEL = "presage-tiny"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
HELLO: list[Any] = [{"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    """The engine in process, small."""
    from presage.engine.async_llm import AsyncLLM

    made = AsyncLLM.from_engine_args(model=MODEL, max_num_seqs=16, kv_cache_memory="64MiB", max_model_len=1024)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def base(real: Any) -> Iterator[str]:
    """The server."""
    with served(real, enable_auto_tool_choice=True, tool_call_parser="hermes") as url:
        yield url


@pytest.fixture(scope="module")
def api(base: str) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=base + "/v1", api_key="x", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("extra", [{"temperature": 0}, {"temperature": 0.9, "seed": 7}])
def test_stream_is_the_whole_answer(api: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = api.completions.create(model=MODEL, prompt="SELECT name FROM", max_tokens=30, **extra)
    parts = list(api.completions.create(model=MODEL, prompt="SELECT name FROM", max_tokens=30, stream=True, **extra))
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text != ""
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 30


def test_batch_mates_do_not_change_greedy_text(api: openai.OpenAI) -> None:
    prompts = ["def add(a, b):", "import numpy as", "Once upon a time"]
    alone = [api.completions.create(model=MODEL, prompt=p, max_tokens=12, temperature=0).choices[0].text for p in prompts]
    together = api.completions.create(model=MODEL, prompt=prompts, max_tokens=12, temperature=0)
    assert [c.text for c in together.choices] == alone


def test_chat_and_choices(api: openai.OpenAI, base: str) -> None:
    body = {"messages": HELLO, "max_tokens": 10, "n": 2, "seed": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    answer = httpx.post(base + "/v1/chat/completions", json=body, timeout=60).json()
    chat.ChatResponse.model_validate(answer)
    for choice in answer["choices"]:
        entries = choice["logprobs"]["content"]
        assert len(entries) == len(choice["token_ids"])
        assert all(e["logprob"] <= 0 and len(e["top_logprobs"]) == 2 for e in entries)
        shown = b"".join(bytes(e["bytes"]) for e in entries).decode(errors="replace")
        assert shown.startswith(choice["message"]["content"])


def test_echo_scores_the_prompt(base: str) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = httpx.post(base + "/v1/completions", json=body, timeout=60).json()
    completions.CompletionResponse.model_validate(answer)
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None and all(p < 0 for p in found["token_logprobs"][1:])
    assert "".join(found["tokens"]) == answer["choices"][0]["text"] == "The capital of France is"


def test_stop_string(api: openai.OpenAI) -> None:
    free = api.completions.create(model=MODEL, prompt="SELECT name FROM", max_tokens=30, temperature=0).choices[0].text
    stop = free[5:7]
    cut = api.completions.create(model=MODEL, prompt="SELECT name FROM", max_tokens=30, temperature=0, stop=stop)
    assert cut.choices[0].text == free[: free.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_forced_tool_call_is_valid(api: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in (named, "required"):
        r = api.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=120, parallel_tool_calls=False, temperature=0
        )  # type: ignore[call-overload]
        assert r.choices[0].finish_reason == "tool_calls", r
        call = r.choices[0].message.tool_calls[0].function
        arguments = json.loads(call.arguments)
        assert call.name == "get_weather" and set(arguments) == {"city", "days"} and isinstance(arguments["days"], int)


def test_json_schema_is_obeyed(api: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    r = api.chat.completions.create(model=MODEL, messages=HELLO, response_format=shape, max_tokens=40, temperature=1.0, seed=1)
    assert isinstance(json.loads(r.choices[0].message.content or "")["ok"], bool)
    chosen = api.completions.create(model=MODEL, prompt="Answer:", max_tokens=10, extra_body={"guided_choice": ["red", "blue"]})
    assert chosen.choices[0].text in ("red", "blue")


def test_bad_grammar_is_a_400(base: str) -> None:
    for stream in (False, True):
        r = httpx.post(base + "/v1/completions", json={"prompt": "x", "guided_regex": "(", "stream": stream}, timeout=60)
        assert r.status_code == 400 and r.json()["error"]["code"] == "invalid_grammar"


def test_disconnect_frees_the_engine(base: str, real: Any) -> None:
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            with httpx.stream(
                "POST",
                base + "/v1/completions",
                json={"prompt": "a b", "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 8},
                timeout=0.3,
            ) as r:
                for _ in r.iter_raw():
                    raise httpx.ReadTimeout("enough")
        assert eventually(lambda: real.stats()["running"] == real.stats()["waiting"] == 0)


def test_cached_tokens_are_reported(api: openai.OpenAI) -> None:
    prompt = "one two three four five six seven eight nine ten " * 12
    cached = []
    for _ in range(2):
        details = api.completions.create(model=MODEL, prompt=prompt, max_tokens=2).usage.prompt_tokens_details  # type: ignore[union-attr]
        cached.append(details.cached_tokens if details else None)
    assert cached[1] > cached[0]


def test_many_at_once(base: str) -> None:
    answers: list[int] = []

    def one(i: int) -> None:
        body = {"prompt": f"number {i}", "max_tokens": 8, "ignore_eos": True}
        answers.append(httpx.post(base + "/v1/completions", json=body, timeout=60).json()["usage"]["completion_tokens"])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(40)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [8] * 40


def test_embeddings(base: str) -> None:
    answer = httpx.post(base + "/v1/embeddings", json={"input": ["a cat", "a cat", "SELECT 1"]}, timeout=60).json()
    other.EmbeddingResponse.model_validate(answer)
    a, b, c = (d["embedding"] for d in answer["data"])
    assert a == b != c and abs(sum(x * x for x in a) - 1) < 1e-4


def test_metrics_after_work(base: str) -> None:
    text = httpx.get(base + "/metrics").text
    lines = {x.split("{")[0]: float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith("presage:")}
    assert lines["presage:generation_tokens_total"] > 100 and lines["presage:request_prefill_time_seconds_count"] > 10
    assert lines["presage:engine_steps_total"] > 10 and lines["presage:step_measured_seconds_total"] > 0
