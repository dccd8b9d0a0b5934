"""Answers against OpenAI's own OpenAPI document, and against ours."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from presage.serve.protocol import chat, completions, other
from tests.shared import shared_data

CHAT = {"messages": [{"role": "user", "content": "SAY:some words"}], "logprobs": True, "top_logprobs": 2, "n": 2}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = [{"role": "user", "content": 'SAY:<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'}]
TEXT = {"prompt": "x SAY:some words", "max_tokens": 20, "logprobs": 2}


@cache
def openai_schemas() -> dict[str, Any]:
    """The component schemas; ``nullable`` (3.0) is spelled as 3.1 does, since the document mixes both."""
    text = shared_data("openai_openapi/openapi.yaml").read_text()
    document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found: dict[str, Any] = _nullable(document["components"]["schemas"])
    return found


def _nullable(node: Any) -> Any:
    if isinstance(node, list):
        return [_nullable(v) for v in node]
    if not isinstance(node, dict):
        return node
    out = {k: _nullable(v) for k, v in node.items() if k != "nullable"}
    return {"anyOf": [out, {"type": "null"}]} if node.get("nullable") is True else out


def conforms(body: Any, name: str) -> None:
    """Check a body against a schema of OpenAI's document."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": openai_schemas()}}
    jsonschema.Draft202012Validator(schema).validate(body)


def chunks(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Data events of a stream."""
    text = httpx.post(url, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    return [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]


@pytest.mark.parametrize("extra", [{}, {"tools": TOOLS, "messages": CALL}, {"max_tokens": 1}])
def test_chat(url: str, extra: dict[str, Any]) -> None:
    body = httpx.post(url + "/v1/chat/completions", json={**CHAT, **extra}).json()
    conforms(body, "CreateChatCompletionResponse")
    chat.ChatResponse.model_validate(body)
    parts = chunks(url + "/v1/chat/completions", {**CHAT, **extra})
    assert len(parts) >= 4
    for part in parts:
        conforms(part, "CreateChatCompletionStreamResponse")
        chat.ChatChunk.model_validate(part)


def test_completions(url: str) -> None:
    body = httpx.post(url + "/v1/completions", json=TEXT).json()
    conforms(body, "CreateCompletionResponse")
    completions.CompletionResponse.model_validate(body)
    for part in chunks(url + "/v1/completions", TEXT):
        completions.CompletionResponse.model_validate(part)
        if part["choices"] and part["choices"][0]["finish_reason"] is None:
            part["choices"][0]["finish_reason"] = "stop"  # their schema forgets the null that their own streams have
        if part["usage"] is None:
            del part["usage"]
        conforms(part, "CreateCompletionResponse")


def test_echoed_and_extended_answers_match_our_models(url: str) -> None:
    extra = {"prompt_logprobs": 1, "return_token_ids": True}
    completions.CompletionResponse.model_validate(httpx.post(url + "/v1/completions", json={**TEXT, **extra, "echo": True}).json())
    chat.ChatResponse.model_validate(httpx.post(url + "/v1/chat/completions", json={**CHAT, **extra}).json())


@pytest.mark.parametrize(
    ("path", "schema", "model"),
    [("/v1/models", "ListModelsResponse", other.ModelList), ("/v1/models/presage-tiny", "Model", other.ModelCard)],
)
def test_models(url: str, path: str, schema: str, model: Any) -> None:
    body = httpx.get(url + path).json()
    conforms(body, schema)
    model.model_validate(body)


def test_embeddings(url: str) -> None:
    body = httpx.post(url + "/v1/embeddings", json={"input": ["a", "b"]}).json()
    conforms(body, "CreateEmbeddingResponse")
    other.EmbeddingResponse.model_validate(body)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "x", "top_p": 5}),
        ("POST", "/v1/completions", {"prompt": [5] * 5000}),
        ("POST", "/v1/chat/completions", {"messages": []}),
        ("POST", "/v1/completions", {"model": "x", "prompt": "x"}),
        ("POST", "/v1/completions", {"prompt": "BOOM", "max_tokens": 5}),
        ("GET", "/nope", None),
        ("DELETE", "/v1/models", None),
    ],
)
def test_errors(url: str, method: str, path: str, body: Any) -> None:
    r = httpx.request(method, url + path, json=body)
    assert r.status_code >= 400
    conforms(r.json(), "ErrorResponse")


def test_every_openai_request_field_is_known_or_refused_by_name(url: str) -> None:
    """Fields of OpenAI's request schemas are known; those that we do not support take null and refuse anything else by name."""
    refused = {"audio", "web_search_options", "moderation", "function_call", "functions", "prompt_cache_options"}
    assert _properties("CreateChatCompletionRequest") <= set(chat.ChatRequest.model_fields)
    assert _properties("CreateCompletionRequest") <= set(completions.CompletionRequest.model_fields)
    assert _properties("CreateEmbeddingRequest") <= set(other.EmbeddingRequest.model_fields)
    body = {"messages": CALL, "max_tokens": 2}
    assert httpx.post(url + "/v1/chat/completions", json={**body, **dict.fromkeys(refused)}).status_code == 200
    for field in refused:
        r = httpx.post(url + "/v1/chat/completions", json={**body, field: {}})
        assert r.status_code == 400 and r.json()["error"]["param"] == field


def _properties(name: str) -> set[str]:
    schema = openai_schemas()[name]
    out = set(schema.get("properties", {}))
    for part in schema.get("allOf", []):
        out |= _properties(part["$ref"].rpartition("/")[2]) if "$ref" in part else set(part.get("properties", {}))
    return out
