"""The hub path against a hub in miniature: an HTTP server on this machine that answers as the real one does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from presage.bundled import bundled_path
from presage.models.loading import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRY = """
import sys
from presage.core.errors import CheckpointError
from presage.models.loading import open_checkpoint, resolve
from presage.tokenize import Tokenizer
try:
    if sys.argv[1] == "tokenizer":
        print(Tokenizer.load(sys.argv[2]).encode("def f"))
        print(sorted(p.name for p in resolve(sys.argv[2], weights=False).iterdir()))
    else:
        print(open_checkpoint(sys.argv[2]).nbytes)
except CheckpointError as error:
    print("refused:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """One repository, ``our/tiny``, which holds the bundled draft model and a file nobody needs."""

    asked: list[str]
    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/our/tiny"):
            listed = [{"rfilename": n, "size": len(b)} for n, b in self.files.items()]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in self.files.items()]
            answer: object = tree if "/tree/" in path else {"id": "our/tiny", "sha": COMMIT, "siblings": listed}
            self._send(200, json.dumps(answer).encode(), with_body, "application/json")
        elif path.startswith("/our/tiny/resolve/") and name in self.files:
            self._send(200, self.files[name], with_body, "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, status: int, body: bytes, with_body: bool, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    folder = bundled_path("presage-tiny-draft")
    assert folder is not None
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix != ".md"}
    asked: list[str] = []
    handler = type("OneHub", (Hub,), {"files": {**files, "pytorch_model.bin": b"unwanted"}, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def attempt(what: str, name: str, home: Path, endpoint: str, **more: str) -> str:
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
    result = subprocess.run([sys.executable, "-c", TRY, what, name], capture_output=True, text=True, timeout=240, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_hub_name_is_fetched_once_and_then_cached(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = hub
    ids, names = attempt("tokenizer", "our/tiny", tmp_path, url).splitlines()
    assert json.loads(ids)
    assert "model.safetensors" not in names
    assert "tokenizer.json" in names
    size = f"{open_checkpoint('presage-tiny-draft').nbytes}\n"
    assert attempt("model", "our/tiny", tmp_path, url) == size
    assert not [p for p in asked if p.endswith("pytorch_model.bin")]
    # Neither an absent network nor offline mode loses what is cached.
    assert attempt("model", "our/tiny", tmp_path, "http://127.0.0.1:9") == size
    assert attempt("model", "our/tiny", tmp_path, url, HF_HUB_OFFLINE="1") == size


def test_an_unknown_name_is_one_line(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    out = attempt("model", "our/other", tmp_path, hub[0])
    assert out.startswith("refused: our/other: not a local folder, and the hub answered:")
    assert out.count("\n") == 1
