"""Streams: framing, errors on the way, disconnects, silence."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from presage.serve.metrics import Metrics
from tests.http.echo import EchoEngine
from tests.http.server import eventually, served
from tests.shared import shared_data

MODEL = "presage-tiny"


@pytest.fixture(scope="module")
def echo() -> EchoEngine:
    """The engine whose inside these tests look at."""
    return EchoEngine(max_waiting=4)


@pytest.fixture(scope="module")
def base(echo: EchoEngine) -> Iterator[str]:
    """A server that pings and gives up quickly."""
    with served(echo, stream_ping=0.2, stream_grace=0.2, send_timeout=1.0) as url:
        yield url


def events(text: str) -> list[str]:
    """Payloads of the data events."""
    return [block.removeprefix("data: ") for block in text.split("\n\n") if block.startswith("data: ")]


def test_framing_is_exact(base: str) -> None:
    r = httpx.post(base + "/v1/completions", json={"prompt": "x SAY:a\n\nb", "max_tokens": 20, "stream": True})
    assert r.headers["content-type"].startswith("text/event-stream") and r.headers["x-request-id"]
    assert r.text.endswith("data: [DONE]\n\n") and r.text.count("[DONE]") == 1
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events(r.text)[:-1]) == "a\n\nb"


def test_late_failure_is_an_event_then_done(base: str) -> None:
    r = httpx.post(base + "/v1/completions", json={"prompt": "BOOM SLOW", "max_tokens": 9, "stream": True})
    found = events(r.text)
    assert r.status_code == 200 and found[-1] == "[DONE]"
    assert json.loads(found[-2])["error"] == {"message": "boom", "type": "server_error", "param": None, "code": "step_failed"}
    with openai.OpenAI(base_url=base + "/v1", api_key="x") as client, pytest.raises(openai.APIError, match="boom"):
        list(client.completions.create(model=MODEL, prompt="BOOM", max_tokens=9, stream=True))


@pytest.mark.parametrize("word", ["REFUSE", "LATE"])
def test_early_refusal_keeps_its_status(base: str, word: str) -> None:
    for stream in (True, False):
        r = httpx.post(base + "/v1/completions", json={"prompt": word, "stream": stream})
        assert r.status_code == 400 and r.json()["error"]["code"] == "invalid_grammar"


def test_failure_of_a_whole_answer(base: str, echo: EchoEngine) -> None:
    r = httpx.post(base + "/v1/completions", json={"prompt": ["BOOM", "FOREVER"], "max_tokens": 9})
    assert r.status_code == 500 and r.json()["error"]["code"] == "step_failed"
    assert eventually(lambda: not echo.live), "the other prompt's request must have been aborted"


def test_full_queue_says_when_to_retry(base: str, echo: EchoEngine) -> None:
    with httpx.Client(timeout=10) as client:
        threads = [threading.Thread(target=lambda: _ignore(base, "FOREVER")) for _ in range(4)]
        for t in threads:
            t.start()
        assert eventually(lambda: len(echo.live) == 4)
        for stream in (False, True):
            r = client.post(base + "/v1/completions", json={"prompt": "hi", "stream": stream})
            assert r.status_code == 503 and r.headers["retry-after"] == "3" and r.json()["error"]["code"] == "queue_full"
        for t in threads:
            t.join()
        assert eventually(lambda: not echo.live)


def _ignore(base: str, prompt: str) -> None:
    try:
        httpx.post(base + "/v1/completions", json={"prompt": prompt, "max_tokens": 9}, timeout=1.0)
    except httpx.TimeoutException:
        return


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["FOREVER", "MUTE"])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_disconnect_aborts(base: str, echo: EchoEngine, stream: bool, prompt: str, path: str) -> None:
    content = {"prompt": prompt, "max_tokens": 9} if path == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    before = len(echo.aborted)
    with pytest.raises(httpx.ReadTimeout):
        with httpx.stream("POST", f"{base}/v1/{path}", json={**content, "stream": stream}, timeout=0.4) as r:
            until = time.monotonic() + 0.6
            for _ in r.iter_raw():
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("enough")
    assert eventually(lambda: not echo.live) and eventually(lambda: len(echo.aborted) > before)
    assert eventually(lambda: httpx.get(base + "/load").json()["server_load"] == 0)


def test_stop_found_in_the_text_aborts_the_engine(base: str, echo: EchoEngine) -> None:
    before = len(echo.aborted)
    r = httpx.post(base + "/v1/completions", json={"prompt": "FOREVER abc", "max_tokens": 99, "stop": "abc"})
    assert r.json()["choices"][0]["text"] == "FOREVER " and r.json()["choices"][0]["finish_reason"] == "stop"
    assert eventually(lambda: len(echo.aborted) > before and not echo.live)


def test_silence_is_bridged_by_comments(base: str, echo: EchoEngine) -> None:
    seen = b""
    with pytest.raises(httpx.ReadTimeout):
        with httpx.stream("POST", base + "/v1/completions", json={"prompt": "MUTE", "stream": True}, timeout=1.0) as r:
            assert r.status_code == 200
            for raw in r.iter_raw():
                seen += raw
                if seen.count(b"\n\n") >= 3:
                    raise httpx.ReadTimeout("enough")
    assert seen.startswith(b": waiting\n\n") and b"data" not in seen


def test_reader_that_stalls_is_dropped(base: str, echo: EchoEngine) -> None:
    """A client that stops reading fills its buffers; the request ends although the connection stays open."""
    address = urlsplit(base)
    body = json.dumps({"prompt": "FOREVER " + "word " * 50, "n": 128, "max_tokens": 1900, "stream": True, "logprobs": 5}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((address.hostname, address.port))
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: len(echo.live) == 1)
        assert eventually(lambda: not echo.live, 15)


def test_request_ids(base: str) -> None:
    sent = {"X-Request-Id": "mine-123"}
    assert httpx.get(base + "/version", headers=sent).headers["x-request-id"] == "mine-123"
    assert httpx.get(base + "/nowhere", headers=sent).headers["x-request-id"] == "mine-123"
    first, second = (httpx.get(base + "/version").headers["x-request-id"] for _ in range(2))
    assert first != second
    assert httpx.get(base + "/version", headers={"X-Request-Id": "x" * 999}).headers["x-request-id"] != "x" * 999


def test_same_request_id_twice_is_two_requests(base: str, echo: EchoEngine) -> None:
    ids = {httpx.post(base + "/v1/completions", json={"prompt": "x SAY:a"}, headers={"X-Request-Id": "same"}).json()["id"] for _ in range(2)}
    assert len(ids) == 2


def test_chunks_look_like_recorded_ones(base: str) -> None:
    """Every field that recorded servers send in a chunk is in ours too, and the openai types read both."""
    folder = shared_data("sse_replays/meta/llama-3.1-8b-instruct")
    ours = httpx.post(base + "/v1/completions", json={"prompt": "x SAY:a b", "stream": True}).text
    theirs = (folder / "completions/completion.streaming.1").read_text()
    assert _fields(theirs) - {"usage"} <= _fields(ours)
    chat = httpx.post(base + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "SAY:a b"}], "stream": True}).text
    assert _fields((folder / "chat_completions/chat-completion.streaming.1").read_text()) - {"usage"} <= _fields(chat)


def _fields(text: str) -> set[str]:
    found: set[str] = set()
    for e in events(text):
        if e.startswith("{"):
            body: dict[str, Any] = json.loads(e)
            found |= set(body) | {k for c in body["choices"] for k in c}
    return found


def test_metrics_have_no_global_state() -> None:
    first, second = (Metrics(EchoEngine(), "m") for _ in range(2))
    first.finished("stop")
    assert b'finished_reason="stop"' in first.page() and b'finished_reason="stop"' not in second.page()
