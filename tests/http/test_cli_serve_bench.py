"""``presage bench serve`` against servers whose behaviour is known."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from presage.bench.client import StreamReader
from presage.bench.compare import comparison, load_result, shown
from presage.bench.config import ServeBench
from presage.bench.load import Generator, Job, Limits, Run
from presage.bench.measures import Record, summarise
from presage.bench.null_server import Behaviour, null_server
from presage.bench.serving import bench_serve, endpoint, offer
from presage.bench.sweep import bench_sweep
from presage.bench.wire import Answer, Pool
from presage.core.errors import ConfigError
from tests.http.echo import EchoEngine
from tests.http.server import served


def chunk(text: str, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}], **more}).encode() + b"\n\n"


class Scripted:
    """A server that answers each request with three tokens; ``gate`` must open first if there is one."""

    def __init__(self, gate: int = 0, fail: int = 0, say: str = "bc") -> None:
        self.gate, self.fail, self.say, self.open = gate, fail, say, asyncio.Event()
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
        await out.write(chunk(self.say) + b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n')
        return out


def bodies(n: int) -> list[Job]:
    return [Job(lambda history, i=i: json.dumps({"i": i}).encode()) for i in range(n)]  # type: ignore[misc]


async def measured(server: Scripted, jobs: Sequence[Job], **limits: Any) -> Run:
    """Offer jobs to a scripted server."""
    app = web.Application()
    app.router.add_post("/v1/completions", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        pool = Pool(f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions", spare=2)
        return await asyncio.wait_for(Generator(pool, jobs, limits=Limits(**limits)).run(), 30)
    finally:
        # The application waits for its handlers.
        server.open.set()
        await runner.cleanup()


def test_tokens_chunks_and_usage_are_read() -> None:
    [record] = asyncio.run(measured(Scripted(), bodies(1))).records
    assert record.ok and (record.n_in, record.n_out, len(record.chunks)) == (7, 3, 2)
    assert record.t_done == record.chunks[-1] > record.chunks[0] > record.t_send >= record.t_sched
    assert record.tpot == pytest.approx((record.chunks[1] - record.chunks[0]) / 2)


def test_the_loop_is_open() -> None:
    # The server answers nobody until all have come: a generator that waits for answers would never end.
    server = Scripted(gate=40)
    run = asyncio.run(measured(server, bodies(40)))
    assert all(r.ok for r in run.records) and server.peak == 40


def test_waiting_for_a_seat_stays_in_the_first_token_time_but_is_not_the_clients_error() -> None:
    server = Scripted()
    records = asyncio.run(measured(server, bodies(5), concurrency=1)).records
    assert server.peak == 1
    in_order = sorted(records, key=lambda r: r.t_send)
    assert all(b.t_send >= a.t_done for a, b in pairwise(in_order))
    # All were due at the same moment, so the last one's clock ran through the others' ten milliseconds each.
    assert in_order[-1].ttft >= sum(r.t_done - r.chunks[0] for r in in_order[:-1])
    assert all(r.held >= a.t_done - a.t_sched for a, r in pairwise(in_order))
    assert in_order[-1].send_error == pytest.approx(in_order[-1].t_send - in_order[-1].t_sched - in_order[-1].held)


def test_refused_requests_are_counted() -> None:
    s = summarise(asyncio.run(measured(Scripted(gate=6, fail=0), bodies(6))).records)
    assert (s.completed, s.failed) == (6, 0)
    records = asyncio.run(measured(Scripted(fail=100), bodies(3))).records
    assert [r.ok for r in records] == [False] * 3 and "HTTP 503" in records[0].error and "busy" in records[0].error


def test_a_turn_follows_the_answer_before_after_its_think_time() -> None:
    server, heard = Scripted(), list[Sequence[str]]()

    def later(history: Sequence[str]) -> bytes:
        heard.append([*history])
        return b'{"i": 1}'

    jobs = [*bodies(1), Job(later, math.nan, after=0, think=0.05), Job(later, math.nan, after=1)]
    a, b, c = asyncio.run(measured(server, jobs)).records
    assert all(r.ok for r in (a, b, c))
    assert b.t_sched == pytest.approx(a.t_done + 0.05, abs=0.02) and b.t_sched >= a.t_done + 0.05
    assert c.t_sched >= b.t_done and c.t_send > c.t_sched - 1e-9
    assert heard == [["abc"], ["abc", "abc"]]


def test_turns_after_a_failed_one_fail_and_the_run_ends() -> None:
    jobs = [*bodies(1), Job(lambda h: b"{}", math.nan, after=0), Job(lambda h: b"{}", math.nan, after=1)]
    records = asyncio.run(measured(Scripted(fail=100), jobs)).records
    assert [r.ok for r in records] == [False] * 3 and records[2].error.startswith("not sent")


def test_a_request_that_takes_too_long_is_a_timeout() -> None:
    run = asyncio.run(measured(Scripted(gate=99), bodies(2), timeout=0.1))
    assert all("timeout" in r.error for r in run.records)


def test_ctrl_c_keeps_what_there_is() -> None:
    async def stopped() -> Run:
        server = Scripted()
        app = web.Application()
        app.router.add_post("/", server.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        jobs = [Job(lambda h: b"{}", at) for at in (0.0, 0.0, 900.0)]
        generator = Generator(Pool(f"http://127.0.0.1:{runner.addresses[0][1]}/", spare=1), jobs)
        # Once two have ended, somebody presses Ctrl-C; the third is due much later.
        generator.on_end = lambda record: generator.left == 1 and asyncio.get_running_loop().call_soon(generator.stop)  # type: ignore[assignment,return-value]
        try:
            return await asyncio.wait_for(generator.run(), 60)
        finally:
            await runner.cleanup()

    run = asyncio.run(stopped())
    assert run.interrupted and len(run.records) == 2 and all(r.ok for r in run.records)


def test_nobody_listening_is_a_typed_error() -> None:
    config = ServeBench(base_url="http://127.0.0.1:9", ready_check_timeout_sec=0.01)
    with pytest.raises(ConfigError, match="does not answer"):
        asyncio.run(offer(config, bodies(1)))
    with pytest.raises(ConfigError, match="base_url"):
        Pool("localhost:8000")
    assert endpoint(ServeBench(backend="openai-chat")).endswith(":8000/v1/chat/completions")


class Taken:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.status, self.data, self.ends = 0, b"", list[str]()

    def head(self, status: int) -> None:
        """Keep."""
        self.status = status

    def body(self, data: bytes, now: float) -> None:
        """Keep."""
        self.data += data

    def end(self, error: str) -> None:
        """Keep."""
        self.ends.append(error)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n5;x=1\r\ndefgh\r\n0\r\nTrailer: x\r\n\r\n"
COUNTED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\ncontent-length: 8\r\nConnection: close\r\n\r\nabcdefgh"


@pytest.mark.parametrize(("data", "status", "close"), [(CHUNKED, 200, False), (COUNTED, 404, True)])
def test_answers_survive_any_cut(data: bytes, status: int, close: bool) -> None:
    for size in range(1, len(data) + 1):
        answer, sink = Answer(), Taken()
        answer.sink = sink
        done = [answer.feed(data[i : i + size], 0.0) for i in range(0, len(data), size)]
        assert done == [False] * (len(done) - 1) + [True]
        assert (sink.status, sink.data, sink.ends, answer.close) == (status, b"abcdefgh", [""], close)


def test_what_is_not_http_is_refused() -> None:
    answer = Answer()
    answer.sink = Taken()
    with pytest.raises(ValueError, match="not an HTTP answer"):
        answer.feed(b"SSH-2.0-x\r\n\r\n", 0.0)


def read(data: bytes, size: int = 1 << 20) -> Record:
    reader = StreamReader(Record(0.0), lambda reader: None)
    for i in range(0, len(data), size):
        reader.body(data[i : i + size], float(i))
    reader.end("")
    return reader.record


def test_events_survive_any_cut() -> None:
    data = b": ping\r\n\r\n" + chunk("a") + b"event: x\n" + chunk("b").replace(b"\n", b"\r\n") + chunk("c") + b"data: [DONE]\n\n"
    for size in range(1, len(data) + 1):
        assert read(data, size).n_out == 3 and not read(data, size).error


def delta(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": fields}]}).encode() + b"\n\n"


def test_reasoning_and_tool_calls_are_output_and_roles_are_not() -> None:
    end = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    data = delta(role="assistant", content="") + delta(reasoning_content="hm") + delta(reasoning="so") + delta(tool_calls=[{"index": 0}]) + end
    record = read(data)
    assert len(record.chunks) == 3 and record.finish == "stop" and record.ok
    assert read(delta(role="assistant") + end).ok


def test_continuous_usage_tells_tokens_of_pieces() -> None:
    pieces = [chunk(text, usage={"prompt_tokens": 5, "completion_tokens": n}) for text, n in (("a", 1), ("bcd", 4), ("e", 5))]
    record = read(b"".join(pieces) + b"data: [DONE]\n\n")
    assert record.counts == [1, 3, 1] and record.n_out == 5 and len(record.token_times) == 5


def test_errors_inside_a_stream_and_streams_cut_short_are_failures() -> None:
    assert "overloaded" in read(chunk("a") + b'data: {"error": {"message": "overloaded"}}\n\ndata: [DONE]\n\n').error
    assert "without [DONE]" in read(chunk("a")).error
    assert "no text" in read(b"data: [DONE]\n\n").error
    assert "not what it should be" in read(b"data: {nonsense\n\ndata: [DONE]\n\n").error


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(EchoEngine()) as base:
        yield base


def settings(url: str, tmp_path: Path, **more: Any) -> ServeBench:
    return ServeBench.model_validate(
        {
            "base_url": url, "served_model_name": EchoEngine().model_names[0], "tokenizer": "presage-tiny", "num_prompts": 6,
            "random_input_len": 5, "random_output_len": 4, "request_rate": 200.0, "goodput": ["ttft:60000"], "save_detailed": True,
            "result_dir": str(tmp_path), "result_filename": "r.json", "prompt_ids": False, **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_whole_command_against_our_server(url: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"report": str(tmp_path / "page.html"), "save_records": str(tmp_path / "rows.csv")}
    config = settings(url, tmp_path, backend=backend, num_warmups=1, tenants=2, **files)
    assert bench_serve(config) == 0
    printed = capsys.readouterr().out
    assert "Successful requests:                     6" in printed and "P99 send delay (ms):" in printed
    saved = load_result(tmp_path / "r.json")
    assert saved["completed"] == 6 and len(saved["records"]) == 6 and saved["request_goodput"] == saved["request_throughput"]
    assert saved["total_output_tokens"] == sum(r["n_out"] for r in saved["records"]) == sum(saved["output_lens"])
    assert saved["attainment"]["all"] == 1.0 and saved["client"]["cpu_share"] > 0
    assert "+0.0%" in comparison(saved, saved)
    again, table = shown(tmp_path / "r.json").records, shown(tmp_path / "rows.csv").records
    assert [r.ttft for r in again] == [r.ttft for r in table] and {r.tenant for r in table} <= {"tenant0", "tenant1"}
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "http://" not in page.split("<h2>Settings")[0] and len(page) < 1_000_000


def test_a_conversation_carries_the_servers_own_answers(tmp_path: Path) -> None:
    questions = [{"question_id": 1, "category": "x", "turns": ["first?", "second?"]}]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    seen: list[dict[str, Any]] = []

    async def go(fake: Callable[[web.Request], Any]) -> Run:
        from presage.bench.jobs import make_jobs, make_workload
        from presage.bench.serving import tokenizer

        app = web.Application()
        app.router.add_post("/v1/chat/completions", fake)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        config = ServeBench(
            base_url=f"http://127.0.0.1:{runner.addresses[0][1]}", backend="openai-chat", dataset_name="mt_bench", dataset_path=str(tmp_path),
            ready_check_timeout_sec=0, output_len=3,
        )  # fmt: skip
        codec = tokenizer(config)
        try:
            return await asyncio.wait_for(offer(config, make_jobs(make_workload(config, codec), config, codec)), 30)
        finally:
            await runner.cleanup()

    async def fake(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return web.Response(body=delta(content="yes") + b"data: [DONE]\n\n", content_type="text/event-stream")

    run = asyncio.run(go(fake))
    assert all(r.ok for r in run.records)
    assert [m["content"] for m in seen[1]["messages"]] == ["first?", "yes", "second?"]
    assert [m["role"] for m in seen[1]["messages"]] == ["user", "assistant", "user"] and seen[0]["max_tokens"] == 3


def test_a_stall_is_seen_by_everyone_who_came_during_it() -> None:
    # Coordinated omission: a generator that waits for answers would show the stall in one request only.
    with null_server(Behaviour(ttft=0.005, gap=0.0, tokens=1, stall_at=0.3, stall=0.6)) as server:
        jobs = [Job(lambda h: b"{}", 0.01 * i) for i in range(120)]
        run = asyncio.run(Generator(Pool(f"{server.url}/v1/completions"), jobs).run())
        arrived = server.arrivals()
    assert len(arrived) == 120 and all(r.ok for r in run.records)
    slow = [r for r in run.records if r.ttft > 0.1]
    assert len(slow) >= 40
    # Their waits shrink by the time between them: each counts from its own schedule.
    waits = [r.ttft for r in slow]
    assert waits[0] > 0.45 and waits[0] - waits[20] == pytest.approx(0.2, abs=0.05)


def test_a_search_for_the_capacity_of_a_null_server_and_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with null_server(Behaviour(ttft=0.001, gap=0.001, tokens=2)) as server:
        report = str(tmp_path / "sweep.html")
        config = settings(server.url, tmp_path, num_prompts=20, report=report, result_filename="s.jsonl", save_detailed=False)
        found = bench_sweep(config, [400.0, 100.0])
    assert [rate for rate, _ in found.trials] == [100.0, 400.0] and found.rate == 400.0
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
    page = (tmp_path / "sweep.html").read_text()
    assert "against rate" in page and "Goodput (highest rate tried" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="needs goals"):
        bench_sweep(config.model_copy(update={"goodput": []}), [])
