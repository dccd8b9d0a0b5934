"""Every code block of the docs is run: ``python`` blocks in one namespace, ``bash`` blocks in one folder, beside one server.

A ``bash`` block that is just ``presage serve ...`` starts that server; it is started once, on a free port, which then stands for 8000 everywhere.
Blocks of other languages (``text``, ``toml``, ``json``) are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tools import imports, reference, sizes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "start.md", *sorted((ROOT / "docs").glob("*/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KNOWN = {"python", "bash", "text", "toml", "json", "yaml"}
DEFAULT = "8000"


class Block(NamedTuple):
    """One code block and where it stands."""

    page: str
    line: int
    language: str
    code: str


def blocks() -> list[Block]:
    """All blocks in reading order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            found.append(Block(str(page.relative_to(ROOT)), text.count("\n", 0, match.start()) + 2, match[1], match[2]))
    return found


class Bench:
    """Where blocks run: a folder, a ``presage`` command, a namespace, a port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.space = folder, dict[str, Any]()
        self.log = (folder / "server.log").open("wb")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = str(s.getsockname()[1])
        command = folder / "bin" / "presage"
        command.parent.mkdir()
        # The tests may run from a source tree that is not installed; the command is then only importable.
        command.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c 'from presage.serve.cli import main; main()' \"$@\"\n")
        command.chmod(0o755)
        url = f"http://127.0.0.1:{self.port}"
        ours = {"PYTHONPATH": str(ROOT / "src"), "PRESAGE_URL": f"{url}/v1", "PRESAGE_BASE_URL": url}
        self.env = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", **ours}
        self.server: subprocess.Popen[bytes] | None = None

    def here(self, text: str) -> str:
        """Text with the documented port replaced by ours."""
        return text.replace(f"127.0.0.1:{DEFAULT}", f"127.0.0.1:{self.port}")

    def serve(self, command: str) -> None:
        """Start the documented server, unless it runs."""
        if self.server is None:
            words = [*shlex.split(command), "--port", self.port]
            self.server = subprocess.Popen(words, cwd=self.folder, env=self.env, stdout=self.log, stderr=self.log)
        until = time.monotonic() + 240
        while time.monotonic() < until and self.server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start: " + (self.folder / "server.log").read_text()[-3000:])

    def run(self, block: Block) -> None:
        """Run one block; raises what it raises."""
        code = self.here(block.code)
        if block.language == "python":
            # The newlines make a traceback point at the line of the page.
            exec(compile("\n" * (block.line - 1) + code, str(ROOT / block.page), "exec", dont_inherit=True), self.space)
        elif code.startswith("presage serve") and code.count("\n") == 1:
            self.serve(code)
        else:
            if "curl " in code and shutil.which("curl") is None:
                pytest.skip("no curl here")
            words = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, f"{block.page}:{block.line}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def close(self) -> None:
        """Stop what was started."""
        if self.server is not None:
            self.server.terminate()
            self.server.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    made = Bench(folder)
    try:
        made.serve("presage serve presage-tiny")
        yield made
    finally:
        os.chdir(before)
        made.close()
        if "llm" in made.space:
            made.space["llm"].close()


@pytest.mark.parametrize("block", [b for b in blocks() if b.language in ("python", "bash")], ids=lambda b: f"{b.page}:{b.line}")
def test_block(bench: Bench, block: Block) -> None:
    bench.run(block)


def test_every_block_names_a_known_language() -> None:
    assert not [f"{b.page}:{b.line} {b.language!r}" for b in blocks() if b.language not in KNOWN]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [t for t in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", text) if "://" not in t]
    assert not [t for t in links if not (page.parent / t).exists()]


def test_generated_pages_are_fresh() -> None:
    stale = [n for n, text in reference.pages().items() if (reference.FOLDER / n).read_text(encoding="utf-8") != text]
    assert not stale, "run python -m tools.reference"


def test_the_size_check_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("def long():\n" + "    x = 1\n" * 80 + "\n" * 600)
    _folders, found = sizes.scan(tmp_path)
    assert [f.split(": ")[1].split(",")[0] for f in found] == ["681 lines", "long has 81 lines"]


@pytest.mark.parametrize(
    ("module", "name", "fine"),
    [
        ("schedule.fcfs", "presage.core.plan", True),
        ("schedule.fcfs", "numpy", True),
        ("schedule.fcfs", "torch", False),
        ("schedule.fcfs", "presage.cache.manager", False),
        ("plan.fleet", "scipy.optimize", True),
        ("cache.pool", "scipy", False),
        ("engine.build", "presage.serve.api", False),
        ("bench.load", "presage.serve", False),
        ("serve.cli", "presage.serve.api", True),
        ("execute.executor", "presage.simulate.clock", False),
        ("simulate.oracle", "presage.execute.walk", False),
        ("simulate.oracle", "presage.engine.loop", True),
        ("draft.length.goodput", "presage.draft", False),
        ("draft.suffix", "presage.engine.loop", True),
    ],
)
def test_the_import_rules(module: str, name: str, fine: bool) -> None:
    assert (imports.complaint(module, name) is None) == fine
