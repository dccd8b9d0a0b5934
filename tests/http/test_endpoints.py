"""Models, embeddings, tokens, status and metrics."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import presage
from presage.core.errors import ConfigError
from presage.serve.api import create_app
from presage.serve.config import ServerConfig
from tests.http.echo import EchoEngine
from tests.http.server import served

MODEL = "presage-tiny"


def test_models(client: openai.OpenAI) -> None:
    found = client.models.list().data
    assert [m.id for m in found] == [MODEL] and found[0].object == "model"
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_served_names() -> None:
    echo = EchoEngine()
    with served(echo, served_model_name=["main", "org/alias"]) as base:
        assert [m["id"] for m in httpx.get(base + "/v1/models").json()["data"]] == ["main", "org/alias"]
        assert httpx.get(base + "/v1/models/org/alias").json()["parent"] == "main"
        r = httpx.post(base + "/v1/completions", json={"model": "org/alias", "prompt": "x SAY:a"})
        assert r.json()["model"] == "org/alias" and echo.seen[-1].model == MODEL
        assert httpx.post(base + "/v1/completions", json={"model": MODEL, "prompt": "x"}).status_code == 404


def test_embeddings_as_numbers_and_base64(client: openai.OpenAI) -> None:
    numbers = client.embeddings.create(model=MODEL, input=["a", "b c"], encoding_format="float")
    coded = client.embeddings.create(model=MODEL, input=["a", "b c"])  # the client asks for base64 and decodes it
    assert [e.index for e in numbers.data] == [0, 1]
    for a, b in zip(numbers.data, coded.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-6)
        assert math.isclose(sum(x * x for x in a.embedding), 1.0, abs_tol=1e-5)
    assert numbers.usage.prompt_tokens == numbers.usage.total_tokens > 1


def test_embedding_options(url: str, engine: object) -> None:
    raw = httpx.post(url + "/v1/embeddings", json={"input": [5, 6, 7], "encoding_format": "base64"}).json()
    size = len(base64.b64decode(raw["data"][0]["embedding"])) // 4
    same = httpx.post(url + "/v1/embeddings", json={"input": "a", "dimensions": size})
    assert same.status_code == 200
    cut = httpx.post(url + "/v1/embeddings", json={"input": "a", "dimensions": size - 1})
    assert cut.status_code == 400 and cut.json()["error"]["param"] == "dimensions"
    plain = httpx.post(url + "/v1/embeddings", json={"input": [5, 6, 7], "normalize": False, "pooling": "mean"}).json()["data"][0]["embedding"]
    unit = struct.unpack(f"<{size}f", base64.b64decode(raw["data"][0]["embedding"]))
    length = math.sqrt(sum(x * x for x in plain))
    if not hasattr(engine, "seen"):
        return  # a real model pools differently when asked to
    assert engine.seen[-1].extras == {"pooling": "mean"}
    assert [x / length for x in plain] == pytest.approx(unit, abs=1e-6)


@pytest.mark.parametrize(
    "body", [{"input": []}, {"input": ""}, {"input": [[]]}, {"input": "x", "encoding_format": "hex"}, {"input": "x", "pooling": "max"}, {}]
)
def test_bad_embeddings(url: str, body: dict[str, object]) -> None:
    assert httpx.post(url + "/v1/embeddings", json=body).status_code == 400


def test_too_long_input(url: str) -> None:
    r = httpx.post(url + "/v1/embeddings", json={"input": [5] * 3000})
    assert r.status_code == 400 and r.json()["error"]["n_prompt_tokens"] == 3000


def test_tokenize_and_back(url: str) -> None:
    for text in ("hello world", "", "你好 😀\n\ttab", "<|im_start|>x"):
        ids = httpx.post(url + "/tokenize", json={"prompt": text}).json()
        assert ids["count"] == len(ids["tokens"])
        assert httpx.post(url + "/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": text}
    shown = httpx.post(url + "/tokenize", json={"prompt": "a b", "return_token_strs": True}).json()
    assert len(shown["token_strs"]) == shown["count"]


def test_tokenize_messages_counts_what_chat_charges(url: str, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "SAY:hi"}]
    count = httpx.post(url + "/tokenize", json={"messages": messages}).json()["count"]
    used = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3).usage  # type: ignore[arg-type]
    assert used is not None and used.prompt_tokens == count
    shorter = httpx.post(url + "/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["count"]
    assert shorter < count


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, {"prompt": 5}])
def test_bad_tokenize(url: str, body: dict[str, object]) -> None:
    assert httpx.post(url + "/tokenize", json=body).status_code == 400


def test_detokenize_checks_ids(url: str) -> None:
    for tokens in ([-1], [10**9], ["a"], 5):
        assert httpx.post(url + "/detokenize", json={"tokens": tokens}).status_code == 400


def test_status(url: str) -> None:
    assert httpx.get(url + "/health").json() == {"status": "ok"} == httpx.get(url + "/ready").json()
    assert httpx.get(url + "/version").json() == {"version": presage.__version__}
    assert set(httpx.get(url + "/load").json()) == {"server_load", "num_requests_running", "num_requests_waiting"}


def test_dead_engine_is_not_healthy() -> None:
    echo = EchoEngine()
    with served(echo) as base:
        echo.alive = False
        for path in ("/health", "/ready"):
            r = httpx.get(base + path)
            assert r.status_code == 503 and r.json() == {"status": "dead"}


def _values(base: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(base + "/metrics").text)
    return {s.name: s.value for f in families for s in f.samples if not s.name.endswith("_bucket")}


def test_metrics_count_what_happened() -> None:
    with served(EchoEngine(), vllm_metrics=True) as base:
        before = _values(base)
        body = {"prompt": "x SAY:one two three", "max_tokens": 50, "slo": {"ttft_ms": 60_000}}
        usage = httpx.post(base + "/v1/completions", json=body).json()["usage"]
        httpx.post(base + "/v1/completions", json={"prompt": "BOOM", "max_tokens": 9})
        after = _values(base)
    assert after["presage:prompt_tokens_total"] - before["presage:prompt_tokens_total"] == usage["prompt_tokens"]
    assert after["presage:generation_tokens_total"] == usage["completion_tokens"] + 2  # the failing request made two
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_time_per_output_token_seconds",
    ):
        assert after[f"presage:{name}_count"] >= 1
    assert after["presage:inter_token_latency_seconds_count"] >= usage["completion_tokens"] - 1
    assert (after["presage:request_success_total"], after["presage:request_failure_total"], after["presage:request_slo_total"]) == (1, 1, 1)
    assert (after["presage:kv_cache_usage_perc"], after["presage:prefix_cache_hits_total"]) == (0.25, 3)
    ours = {k.removeprefix("presage:"): v for k, v in after.items() if k.startswith("presage:")}
    theirs = {k.removeprefix("vllm:"): v for k, v in after.items() if k.startswith("vllm:")}
    assert ours == theirs


def test_vllm_prefix_is_off_by_default(url: str) -> None:
    assert "vllm:" not in httpx.get(url + "/metrics").text


def test_server_defaults_apply_where_requests_are_silent() -> None:
    echo = EchoEngine()
    with served(echo, default_sampling_params={"temperature": 0.25, "top_k": 9}) as base:
        httpx.post(base + "/v1/completions", json={"prompt": "x SAY:a", "top_k": 3})
    assert (echo.seen[-1].sampling.temperature, echo.seen[-1].sampling.top_k) == (0.25, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_call_parser", "nope"),
        ("reasoning_parser", "nope"),
        ("default_sampling_params", {"temprature": 1}),
        ("default_sampling_params", {"top_p": 9}),
    ],
)
def test_bad_settings_are_refused_before_serving(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        create_app(EchoEngine(), ServerConfig(**{field: value}))
    assert caught.value.param == field
