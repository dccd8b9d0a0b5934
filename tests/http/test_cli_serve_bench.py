"""``presage bench serve`` against servers whose behaviour is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from presage.bench.client import events, text_of
from presage.bench.config import ServeBench
from presage.bench.datasets import Sample
from presage.bench.load import endpoint, offer, request_body, run_load, session
from presage.bench.measures import Record, summarise
from presage.bench.serving import bench_serve
from presage.core.errors import ConfigError
from tests.http.echo import EchoEngine
from tests.http.server import served


def chunk(text: str, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}], **more}).encode() + b"\n\n"


class Scripted:
    """A server that answers each request with three tokens; ``gate`` must open first if there is one."""

    def __init__(self, gate: int = 0, fail: int = 0) -> None:
        self.gate, self.fail, self.open = gate, fail, asyncio.Event()
        self.bodies: list[dict[str, Any]] = []
        self.live = self.peak = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        self.bodies.append(await request.json())
        self.live += 1
        self.peak = max(self.peak, self.live)
        if len(self.bodies) >= self.gate:
            self.open.set()
        await self.open.wait()
        try:
            return await self._answer(request, len(self.bodies) <= self.fail)
        finally:
            self.live -= 1

    async def _answer(self, request: web.Request, fail: bool) -> web.StreamResponse:
        if fail:
            return web.json_response({"error": {"message": "busy"}}, status=503)
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)
        await out.write(b": a comment\n\n" + chunk("a")[:9])
        await out.write(chunk("a")[9:])
        await asyncio.sleep(0.01)
        await out.write(chunk("bc") + b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n')
        return out


async def measured(server: Scripted, n: int, **settings: Any) -> list[Record]:
    """Offer ``n`` requests at once to a scripted server."""
    app = web.Application()
    app.router.add_post("/v1/completions", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        config = ServeBench(base_url=f"http://127.0.0.1:{port}", num_prompts=n, **settings)
        bodies = [request_body(Sample([1, 2], "x", 3), config, i) for i in range(n)]
        async with session(config) as client:
            return await asyncio.wait_for(offer(client, config, bodies, np.zeros(n)), 30)
    finally:
        await runner.cleanup()


def test_tokens_chunks_and_usage_are_read() -> None:
    [record] = asyncio.run(measured(Scripted(), 1))
    assert record.ok and (record.n_in, record.n_out, len(record.chunks)) == (7, 3, 2)
    assert record.t_done == record.chunks[-1] > record.chunks[0] > record.t_send
    assert record.tpot == pytest.approx((record.chunks[1] - record.chunks[0]) / 2)


def test_the_loop_is_open() -> None:
    # The server answers nobody until all have come: a generator that waits for answers would never end.
    server = Scripted(gate=40)
    records = asyncio.run(measured(server, 40))
    assert all(r.ok for r in records) and server.peak == 40


def test_waiting_for_a_seat_stays_in_the_first_token_time() -> None:
    server = Scripted()
    records = asyncio.run(measured(server, 5, max_concurrency=1))
    assert server.peak == 1
    in_order = sorted(records, key=lambda r: r.t_send)
    assert all(b.t_send >= a.t_done for a, b in pairwise(in_order))
    # All were due at the same moment, so the last one's clock ran through the others' ten milliseconds each.
    assert in_order[-1].ttft >= sum(r.t_done - r.chunks[0] for r in in_order[:-1])


def test_refused_requests_are_counted() -> None:
    s = summarise(asyncio.run(measured(Scripted(gate=6, fail=0), 6)))
    assert (s.completed, s.failed) == (6, 0)
    records = asyncio.run(measured(Scripted(fail=100), 3))
    assert [r.ok for r in records] == [False] * 3 and "HTTP 503" in records[0].error


def test_nobody_listening_is_a_typed_error() -> None:
    config = ServeBench(base_url="http://127.0.0.1:9", ready_check_timeout_sec=0.01)
    with pytest.raises(ConfigError, match="does not answer"):
        asyncio.run(run_load(config, [Sample([1], "x", 1)], np.zeros(1)))


def test_requests_carry_what_was_set() -> None:
    config = ServeBench(model="m", ignore_eos=True, extra_body={"top_k": 3})
    body = request_body(Sample([4, 5], "hi", 6), config, 9)
    assert body["prompt"] == [4, 5] and body["max_tokens"] == 6 and body["ignore_eos"] is True and body["top_k"] == 3 and body["stream"] is True
    chat = ServeBench(backend="openai-chat", served_model_name="other")
    assert request_body(Sample([4], "hi", 6), chat, 0)["messages"][0]["content"] == "hi"
    assert endpoint(chat).endswith(":8000/v1/chat/completions")
    assert request_body(Sample([4], "hi", 6), ServeBench(prompt_ids=False), 0)["prompt"] == "hi"


def test_events_survive_any_cut() -> None:
    data = b": ping\r\n\r\ndata: one\n\ndata:two\r\n\r\nevent: x\ndata: three\n\n"

    class Stream:
        def __init__(self, size: int) -> None:
            self.pieces = [data[i : i + size] for i in range(0, len(data), size)]

        async def iter_any(self) -> Any:
            for piece in self.pieces:
                yield piece

    async def read(size: int) -> list[bytes]:
        return [e async for e in events(Stream(size))]

    for size in range(1, len(data) + 1):
        assert asyncio.run(read(size)) == [b"one", b"two", b"three"]


def test_reasoning_counts_as_text() -> None:
    assert text_of({"choices": [{"delta": {"reasoning_content": "hm"}}]}) == "hm"
    assert text_of({"choices": [{"delta": {"role": "assistant", "content": ""}}]}) == ""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(EchoEngine()) as base:
        yield base


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_whole_command_against_our_server(url: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ServeBench.model_validate(
        {
            "backend": backend, "base_url": url, "served_model_name": EchoEngine().model_names[0], "tokenizer": "presage-tiny", "num_prompts": 6,
            "random_input_len": 5, "random_output_len": 4, "request_rate": 200.0, "goodput": ["ttft:60000"], "save_detailed": True,
            "result_dir": str(tmp_path), "result_filename": "r.json", "num_warmups": 1, "prompt_ids": False,
        }
    )  # fmt: skip
    assert bench_serve(config) == 0
    printed = capsys.readouterr().out
    assert "Successful requests:                     6" in printed
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["completed"] == 6 and len(saved["records"]) == 6 and saved["request_goodput"] == saved["request_throughput"]
    assert saved["total_output_tokens"] == sum(r["n_out"] for r in saved["records"])
