"""The engine as a process of its own: killed engines restart, running requests resume without a duplicate or a missing token."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presage.core.config import EngineConfig
from presage.core.errors import CheckpointError, EngineDead
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.explain import requests
from presage.engine.remote import RemoteEngine
from presage.engine.replay import read_frames

SETTINGS: dict[str, Any] = {"model": "presage-tiny", "kv_cache_memory": "64MiB", "max_model_len": 1024}


def request(name: str, tokens: int, n: int = 1, **fields: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.8, seed=7, n=n)
    return Request(id=name, prompt=np.arange(40, 60, dtype=np.int32), sampling=params, **fields)


async def collect(engine: RemoteEngine, req: Request, seen: asyncio.Event | None = None) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    async for e in engine.submit(req):
        have = out.setdefault(e.branch, [])
        assert e.offset == len(have), "a token came twice or is missing"
        have += e.ids
        if seen is not None and len(have) > 5:
            seen.set()
    return out


def test_killed_engine_resumes_without_duplicates() -> None:
    async def go() -> None:
        engine = RemoteEngine(EngineConfig.of(max_num_seqs=3, **SETTINGS))
        await engine.start()
        try:
            calm = await collect(engine, request("calm", 300))
            calm_n = await collect(engine, request("calm-n", 40, n=2))
            seen = asyncio.Event()
            tasks = [asyncio.create_task(collect(engine, request("calm", 300), seen))]
            tasks += [asyncio.create_task(collect(engine, request(f"queued{i}", 20))) for i in range(6)]
            tasks.append(asyncio.create_task(collect(engine, request("calm-n", 40, n=2))))
            await asyncio.wait_for(seen.wait(), 60)
            assert engine.process is not None
            os.kill(engine.process.pid, signal.SIGKILL)
            outs = await asyncio.wait_for(asyncio.gather(*tasks), 120)
            assert outs[0] == calm, "a resumed request must go on with the ids it would have had"
            assert all(len(o[0]) == 20 for o in outs[1:7])
            assert outs[7] == calm_n
            assert engine.stats()["engine_restarts"] == 1 and await engine.health()
        finally:
            await engine.close()

    asyncio.run(go())


def test_what_the_engine_writes_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    """The decision log while a request runs, the drafter's store after a clean end; the next engine process drafts from it."""
    spec = {"method": "suffix", "suffix_decoding_store": str(tmp_path / "said.bin"), "length": {"policy": "fixed", "num_speculative_tokens": 8}}
    config = EngineConfig.of(speculative_config=spec, decision_log=str(tmp_path / "log"), max_num_seqs=3, **SETTINGS)

    async def go() -> tuple[list[int], int]:
        engine = RemoteEngine(config)
        await engine.start()
        try:
            seen = asyncio.Event()
            task = asyncio.create_task(collect(engine, request("long", 300, model="presage-tiny"), seen))
            await asyncio.wait_for(seen.wait(), 60)
            folder = await engine.decision_log()
            assert folder is not None and not task.done()
            assert "long" in requests(read_frames(folder))
            out = await asyncio.wait_for(task, 60)
            while not engine.stats().get("spec_num_drafts"):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.6)  # two heartbeats: the figures are those at the end
            return out[0], engine.stats()["spec_num_accepted_tokens"]
        finally:
            await engine.close()

    first, accepted = asyncio.run(go())
    assert (tmp_path / "said.bin").exists()
    again, more = asyncio.run(go())
    assert again == first and more > accepted + 50


def test_a_model_that_cannot_load_is_a_typed_error() -> None:
    async def go() -> None:
        engine = RemoteEngine(EngineConfig.of(model="/nowhere/at/all"))
        try:
            with pytest.raises(CheckpointError):
                await engine.start()
        finally:
            await engine.close()

    asyncio.run(go())


def test_an_engine_that_keeps_dying_ends_with_a_clear_error() -> None:
    async def go() -> None:
        engine = RemoteEngine(EngineConfig.of(**SETTINGS))
        await engine.start()
        try:
            task = asyncio.create_task(collect(engine, request("long", 900)))
            for _ in range(8):
                if task.done():
                    break
                await asyncio.wait_for(engine.ready.wait(), 60)
                await asyncio.sleep(0.05)
                if engine.process is not None and engine.process.poll() is None:
                    os.kill(engine.process.pid, signal.SIGKILL)
                await asyncio.sleep(0.3)
            with pytest.raises(EngineDead):
                await asyncio.wait_for(task, 60)
        finally:
            await engine.close()

    asyncio.run(go())
