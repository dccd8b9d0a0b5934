"""SIGTERM: running requests finish, new ones are told to go elsewhere, then the process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.http.server import eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """The server as its own process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    made = subprocess.Popen(
        [sys.executable, "-m", "tests.http.drain_server"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    yield made
    made.kill()
    made.wait()


def test_sigterm_drains(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    base = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    body = {"prompt": "SLOW SAY:" + "word " * 40, "max_tokens": 100, "stream": True}
    with httpx.Client(timeout=20) as client, client.stream("POST", base + "/v1/completions", json=body) as running:
        lines = running.iter_lines()
        first = next(lines)
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(base + "/ready").status_code == 503)
        assert httpx.get(base + "/health").json() == {"status": "draining"}
        refused = httpx.post(base + "/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining" and refused.headers["retry-after"]
        rest = [first, *lines]
    data = [json.loads(x[6:]) for x in rest if x.startswith("data: {")]
    assert "".join(d["choices"][0]["text"] for d in data) == "word " * 40 and rest[-2] == "data: [DONE]"
    assert process.stdout.readline().strip() == "drained"
    assert process.wait(15) in (0, -signal.SIGTERM)


def test_second_signal_ends_at_once(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    base = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    with (
        httpx.Client(timeout=20) as client,
        client.stream("POST", base + "/v1/completions", json={"prompt": "FOREVER", "max_tokens": 9, "stream": True}) as running,
    ):
        next(running.iter_lines())
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: httpx.get(base + "/ready").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) is not None
