"""``presage serve`` ends on a signal: what its engine has to write is written before the process is gone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from presage.draft import suffix_store
from presage.engine.replay import read_frames

pytest.importorskip("torch")


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ready(base: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for the server."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(base + "/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    where, store = port(), tmp_path / "said.bin"
    base = f"http://127.0.0.1:{where}"
    words = f"serve presage-tiny --port {where} --kv-cache-memory 32MiB --max-model-len 256 --decision-log".split()
    spec = ["--speculative-config", f'{{"method": "suffix", "suffix_decoding_store": "{store}"}}']
    process = subprocess.Popen([sys.executable, "-m", "presage.serve.cli", *words, str(tmp_path / "log"), *spec])
    try:
        ready(base, process)
        body = {"prompt": "import os", "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
        choice = httpx.post(base + "/v1/completions", json=body, timeout=60).json()["choices"][0]
        assert not store.exists()
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
    header = store.read_bytes()
    whose = header[header.index(b"presage_tiny@") :].split(b'"')[0].decode()
    ((key, ids),) = suffix_store.read(store, whose)
    assert key == ("", "", "", "") and ids.tolist() == choice["token_ids"]
    assert [tag for tag, _ in read_frames(tmp_path / "log")].count("e") >= 1
