"""Requests made up from the server's own OpenAPI document, and strings known to break things."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from presage.serve.api import create_app
from presage.serve.config import ServerConfig
from tests.http.echo import EchoEngine
from tests.http.server import served
from tests.shared import shared_data

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/load"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/explain/{request_id}"),
]


@pytest.fixture(scope="module")
def described() -> Any:
    """The document as schemathesis reads it, answered in process."""
    app = create_app(EchoEngine(), ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes"))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_documented_operation_is_tried(described: Any) -> None:
    assert sorted((o.ok().method.upper(), o.ok().path) for o in described.get_all_operations()) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_document_is_true(described: Any, method: str, path: str, mode: GenerationMode) -> None:
    """No 5xx, only documented statuses and content types, bodies as documented, and nonsense refused."""
    if method == "GET" and mode is GenerationMode.NEGATIVE:
        pytest.skip("nothing in this request can be wrong")

    document = described.raw_schema
    content = document["paths"][path][method.lower()].get("requestBody", {}).get("content", {})
    wanted = content.get("application/json", {}).get("schema", {})
    validator = jsonschema.Draft202012Validator({**wanted, "components": document["components"]})

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
    @given(described[path][method].as_strategy(generation_mode=mode))
    def attempt(case: Any) -> None:
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        if method == "POST" and response.status_code < 400:
            assert mode is GenerationMode.POSITIVE or validator.is_valid(case.body), f"accepted against the document: {case.body}"

    attempt()


@pytest.fixture(scope="module")
def strings() -> list[str]:
    """The big list of naughty strings."""
    found: list[str] = json.loads(shared_data("naughty_strings/blns.json").read_text())
    return found


def test_naughty_strings_come_back_unharmed(strings: list[str]) -> None:
    with served(EchoEngine(chunk=3, max_waiting=600, max_model_len=8192), max_prompts=600) as base:
        prompts = ["x SAY:" + s for s in strings if s]
        found = httpx.post(base + "/v1/completions", json={"prompt": prompts, "max_tokens": 4000}, timeout=60).json()["choices"]
        for said, choice in zip(prompts, found, strict=True):
            assert choice["text"] == said.partition("SAY:")[2], said


def test_naughty_strings_in_every_text_field(strings: list[str], url: str) -> None:
    with httpx.Client() as client:
        for s in strings[::12]:
            fields: dict[str, Any] = {"stop": s, "user": s, "cache_salt": s, "program_id": s[:200], "stage": s[:200]}
            r = client.post(url + "/v1/completions", json={"prompt": "x SAY:a", **fields}, headers={"X-Request-Id": "a"})
            assert r.status_code == 200
            tool = {"type": "function", "function": {"name": "f", "description": s, "parameters": {"title": s}}}
            body = {"messages": [{"role": "user", "content": s or "x", "name": s}], "tools": [tool], "max_tokens": 3}
            assert client.post(url + "/v1/chat/completions", json=body).status_code == 200
            for path in ("/v1/completions", "/v1/chat/completions"):
                assert client.post(url + path, json={"model": s, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}).status_code in (
                    400,
                    404,
                )
            assert client.get(url + "/v1/models/" + "".join(f"%{b:02x}" for b in s.encode())).status_code in (200, 404)
