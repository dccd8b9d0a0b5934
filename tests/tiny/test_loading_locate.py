"""Names to paths, and whether the machine has room."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from presage.bundled import bundled_path
from presage.core.errors import CheckpointError, NotEnoughMemory
from presage.models.loading import available_memory, check_memory, resolve

TRY = """
import sys, time
from presage.core.errors import CheckpointError
from presage.models.loading import resolve
try:
    print(resolve(*sys.argv[1:]))
except CheckpointError as error:
    print("refused:", error)
"""


def resolve_elsewhere(name: str, **env: str) -> str:
    """In a process of its own, because huggingface_hub reads its environment once."""
    result = subprocess.run(
        [sys.executable, "-c", TRY, name], capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=True
    )
    return result.stdout


def test_unreachable_hub_is_one_line_and_quick(tmp_path: Path) -> None:
    # Port 9 of this machine refuses; the 60 second limit above is the promise about retries.
    out = resolve_elsewhere("nobody/nothing", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert out == "refused: nobody/nothing: not a local folder, not in the hub cache, and the hub cannot be reached\n"


def test_a_silent_hub_does_not_hang_the_start(tmp_path: Path) -> None:
    """The server takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        out = resolve_elsewhere("nobody/nothing", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}", HF_HOME=str(tmp_path))
    assert out.count("\n") == 1
    assert "the hub cannot be reached" in out


def test_offline_says_so_and_the_cache_still_works(tmp_path: Path) -> None:
    out = resolve_elsewhere("some/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert out == "refused: some/model: not a local folder, not in the hub cache, and HF_HUB_OFFLINE is set\n"
    snapshot = tmp_path / "hub/models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    refs = tmp_path / "hub/models--some--model/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert resolve_elsewhere("some/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).strip() == str(snapshot)


def test_local_paths(tmp_path: Path) -> None:
    assert resolve("presage_tiny") == bundled_path("presage-tiny")
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        resolve(tmp_path)
    assert resolve(tmp_path, need_config=False) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"name one of a\.gguf, b\.gguf"):
        resolve(tmp_path)
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file but not"):
        resolve(tmp_path / "w.bin")
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert resolve(str(tmp_path)) == tmp_path


def test_resolving_imports_neither_torch_nor_the_hub() -> None:
    code = "import sys; from presage.tokenize import Tokenizer; Tokenizer.load('presage-tiny').encode('a'); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    for heavy in ("'torch'", "'transformers'", "'huggingface_hub'", "'jinja2'"):
        assert heavy not in loaded


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_memory_is_the_least_of_machine_and_cgroups(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
    assert available_memory(machine(tmp_path / "plain", meminfo)) == 8000 * 1024
    v2 = {
        **meminfo,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "5000000\n",
        "sys/fs/cgroup/a/memory.current": "2000000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    assert available_memory(machine(tmp_path / "v2", v2)) == 3_500_000
    v1 = {
        **meminfo,
        "proc/self/cgroup": "4:cpu:/\n3:memory:/pod\n",
        "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "1000000",
        "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": "400000",
    }
    assert available_memory(machine(tmp_path / "v1", v1)) == 600_000
    assert available_memory() > 0


def test_not_enough_memory_holds_the_numbers() -> None:
    check_memory(10, 5, 15)
    with pytest.raises(NotEnoughMemory, match=r"needs 3 MiB \(2 MiB of weights, at least 1 MiB of KV cache\) but only 2 MiB") as caught:
        check_memory(2 << 20, 1 << 20, (3 << 20) - 1)
    assert caught.value.details == {"weight_bytes": 2 << 20, "kv_bytes_min": 1 << 20, "available": (3 << 20) - 1}
