"""Bodies and connections that mean no good."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from presage.serve.protocol.common import ErrorResponse
from tests.http.echo import EchoEngine
from tests.http.server import eventually, served

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A server with tight limits."""
    with served(EchoEngine(), max_body_bytes=100_000, header_timeout=1.0, body_timeout=1.0, max_connections=300) as url:
        yield url


BODIES = {
    "empty": b"",
    "not json": b"hello",
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "bad utf-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "truncated": b'{"prompt": "x"',
    "trailing": b'{"prompt": "x"} {}',
    "deep arrays": b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep objects": b'{"prompt": "x", "draft": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}",
    "deep schema": b'{"prompt": "x", "guided_json": ' + b'{"not":' * 900 + b"{}" + b"}" * 900 + b"}",
    "control character": b'{"prompt": "\x00"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "huge number": b'{"prompt": [' + b"9" * 5000 + b"]}",
    "unknown field": b'{"prompt": "x", "__class__": 1}',
    "bool as int": b'{"prompt": "x", "n": true}',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BODIES)
def test_bad_body_is_a_400_with_a_body(base: str, path: str, name: str) -> None:
    r = httpx.post(base + path, content=BODIES[name], headers=JSON)
    assert r.status_code == 400, r.text
    assert ErrorResponse.model_validate(r.json()).error.message
    assert len(r.text) < 2000, "hostile input must not be echoed at length"


@pytest.mark.parametrize("path", PATHS)
def test_other_content_types(base: str, path: str) -> None:
    r = httpx.post(base + path, content=b"prompt=x", headers={"content-type": "application/x-www-form-urlencoded"})
    assert r.status_code == 415 and r.json()["error"]["code"] == "unsupported_media_type"


def test_declared_large_body_is_refused(base: str) -> None:
    r = httpx.post(base + "/v1/completions", content=b"x" * 1_000_000, headers=JSON)
    assert r.status_code == 413 and r.json()["error"]["code"] == "body_too_large"


def test_streamed_large_body_is_refused(base: str) -> None:
    r = httpx.post(base + "/v1/completions", content=(b"x" * 10_000 for _ in range(100)), headers=JSON)
    assert r.status_code == 413


def test_unknown_route_method_and_model(base: str) -> None:
    for r, status in (
        (httpx.get(base + "/v1/nope"), 404),
        (httpx.get(base + "/v1/completions"), 405),
        (httpx.get(base + "/v1/models/nope"), 404),
        (httpx.post(base + "/v1/completions", json={"model": "nope", "prompt": "x"}), 404),
    ):
        assert r.status_code == status
        ErrorResponse.model_validate(r.json())
    assert r.json()["error"]["code"] == "model_not_found"
    assert "allow" in httpx.get(base + "/v1/completions").headers


def _open(base: str, data: bytes) -> socket.socket:
    where = urlsplit(base)
    raw = socket.create_connection((where.hostname, where.port), timeout=5)
    raw.sendall(data)
    return raw


def test_slow_head_is_cut_although_bytes_trickle(base: str) -> None:
    raw = _open(base, b"GET /health HTTP/1.1\r\n")
    start = time.monotonic()
    with pytest.raises((ConnectionError, BrokenPipeError, TimeoutError)):
        while time.monotonic() - start < 8:
            raw.sendall(b"x: y\r\n")
            raw.settimeout(0.1)
            try:
                if raw.recv(100) == b"":
                    raise ConnectionResetError
            except TimeoutError:
                continue
        pytest.fail("the connection stayed open")


def test_silent_connection_is_cut(base: str) -> None:
    raw = _open(base, b"")
    assert raw.recv(100) == b""


def test_slow_second_request_is_cut(base: str) -> None:
    raw = _open(base, b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += raw.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")
    raw.sendall(b"GET /ver")
    assert raw.recv(100) == b""


def test_slow_body_gets_408(base: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    raw = _open(base, head)
    answer = b""
    while b"request_timeout" not in answer:
        piece = raw.recv(4096)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 408")


def test_endless_head_is_refused(base: str) -> None:
    raw = _open(base, b"GET / HTTP/1.1\r\nx: ")
    answer = b""
    try:
        for _ in range(100):
            raw.sendall(b"y" * 10_000)
        answer = raw.recv(4096)
    except OSError:
        return
    assert answer == b"" or b" 400 " in answer


def test_garbage_instead_of_http(base: str) -> None:
    assert b" 400 " in _open(base, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").recv(4096)


def test_many_stalled_connections_leave_room_and_are_cut(base: str) -> None:
    stalled = [_open(base, b"POST /v1/completions HTTP/1.1\r\n") for _ in range(250)]
    assert httpx.get(base + "/health").status_code == 200
    assert httpx.post(base + "/v1/completions", json={"prompt": "x SAY:a"}).status_code == 200
    assert all(s.recv(100) == b"" for s in stalled)


def test_too_many_connections_get_503_and_recover(base: str) -> None:
    held = [_open(base, b"") for _ in range(310)]
    answers = [s.recv(4096) for s in held]
    refused = [a for a in answers if a.startswith(b"HTTP/1.1 503")]
    assert refused and json.loads(refused[0].partition(b"\r\n\r\n")[2])["error"]["code"] == "queue_full"
    assert eventually(lambda: httpx.get(base + "/health").status_code == 200)


def test_bodies_in_flight_are_bounded() -> None:
    with served(EchoEngine(), max_body_bytes=50_000, max_buffered_bytes=60_000, body_timeout=2.0) as base:
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 45000\r\n\r\n" + b" " * 40_000
        first = _open(base, head)
        time.sleep(0.2)
        second = _open(base, head)
        assert second.recv(4096).startswith(b"HTTP/1.1 503")
        assert first.recv(4096).startswith(b"HTTP/1.1 408")
        assert eventually(lambda: httpx.post(base + "/tokenize", json={"prompt": "x" * 40_000}).status_code == 200)
