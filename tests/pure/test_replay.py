"""A decision log replays to byte-equal decisions, at level shape (no ids) and tokens; a full disk does not stop serving."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presage.cache.content import HashedContent
from presage.core.config import EngineConfig
from presage.core.errors import ReplayMismatch, RequestError
from presage.core.events import Abort
from presage.core.protocols import Companion
from presage.core.request import Request
from presage.engine.log import DecisionLog, NamedContent
from presage.engine.null import NullExecutor, null_geometry
from presage.engine.replay import log_header, read_frames, replay
from tests.pure.loops import Bench


def record(folder: Path, level: str, seed: int = 0, faults: bool = False) -> Bench:
    """A busy run with aborts, forks, prefix hits, preemptions (and a fault), logged."""
    rng = np.random.default_rng(seed)
    geometry = null_geometry(11)
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 48}
    header = log_header(EngineConfig.of(**settings), geometry, 4, [2], 256)
    log = DecisionLog(folder, level, header=header)
    content = NamedContent(HashedContent(), log) if level == "shape" else None
    executor = NullExecutor(geometry, rule=lambda s, p: 10 + (p * 7) % 50)
    executor.fail = {9} if faults else set()
    b = Bench(11, executor=executor, max_len=256, log=log, content=content, **settings)
    for turn in range(120):
        if rng.random() < 0.25:
            b.add(f"r{turn}", int(rng.integers(1, 5)) * 31, max_tokens=int(rng.integers(1, 60)), n=int(rng.choice([1, 1, 2])))
        elif rng.random() < 0.05:
            b.turn(Abort(f"r{rng.integers(0, turn + 1)}"))
        b.turn()
    b.drain()
    log.shut()
    return b


@pytest.mark.parametrize("level", ["shape", "tokens"])
@pytest.mark.parametrize("faults", [False, True])
def test_replays_to_equal_decisions(tmp_path: Path, level: str, faults: bool) -> None:
    b = record(tmp_path, level, faults=faults)
    assert b.loop.stats["preemptions"] > 0
    assert replay(tmp_path) == b.loop.steps > 50


def test_shape_level_holds_no_ids(tmp_path: Path) -> None:
    record(tmp_path, "shape")
    arrivals = [e for tag, body in read_frames(tmp_path) if tag == "i" for e in body[1] if e[0] == "arrive"]
    assert arrivals and all(isinstance(e[2]["prompt"], int) for e in arrivals)


def test_a_changed_decision_is_found(tmp_path: Path) -> None:
    record(tmp_path, "tokens")
    path = sorted(tmp_path.glob("*.plog"))[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"max_num_batched_tokens\x30", b"max_num_batched_tokens\x20"))
    with pytest.raises(ReplayMismatch):
        replay(tmp_path)


def test_older_logs_replay_and_newer_ones_do_not(tmp_path: Path) -> None:
    record(tmp_path, "tokens")
    path = sorted(tmp_path.glob("*.plog"))[0]
    data, made = path.read_bytes(), replay(tmp_path)
    assert data.count(b"version\x02") == 1
    path.write_bytes(data.replace(b"version\x02", b"version\x01"))
    assert replay(tmp_path) == made
    path.write_bytes(data.replace(b"version\x02", b"version\x03"))
    with pytest.raises(ReplayMismatch, match="not a decision log of this version"):
        replay(tmp_path)


def test_a_log_that_says_it_does_not_replay_is_believed(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, "shape", header=log_header(EngineConfig.of(), null_geometry(11), 4, [2], 256))
    log.note("unreplayable", "drafts are not in the log")
    log.shut()
    with pytest.raises(ReplayMismatch, match="drafts are not in the log"):
        replay(tmp_path)


def test_a_request_that_a_companion_refused_is_refused_again(tmp_path: Path) -> None:
    class Strict(Companion):
        def open(self, slot: int, req: Request) -> None:
            if req.id == "bad":
                raise RequestError("not this one")

    log = DecisionLog(tmp_path, "tokens", header=log_header(EngineConfig.of(), null_geometry(64), 4, [2], 256))
    b = Bench(64, max_len=256, log=log)
    b.loop.companions += (Strict(),)
    for name in ("good", "bad", "late"):
        b.add(name, 40, max_tokens=5)
    b.drain()
    log.shut()
    assert b.finishes("bad") == [(0, "error")] and b.finishes("late") == [(0, "length")]
    assert replay(tmp_path) == b.loop.steps
    assert [body for tag, body in read_frames(tmp_path) if tag == "c"] == [[["refused", "bad"]]]


def test_disk_full_keeps_serving(tmp_path: Path) -> None:
    target = tmp_path / "log"
    target.write_text("a file where the folder should be")
    b = record(target, "shape")
    log = b.loop.log
    assert log.dropped > 0 and not log.replayable and b.loop.stats["finished"] > 5


def test_rotation_is_bounded(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, "shape", max_bytes=1 << 16)
    for i in range(4000):
        log.note("x", "y" * 100)
        if i % 50 == 0:
            log.flush()
    log.shut()
    assert sum(os.path.getsize(p) for p in tmp_path.glob("*.plog")) < 1.5 * (1 << 16) and not log.replayable
