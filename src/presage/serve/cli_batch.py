"""``presage run-batch``: a file of OpenAI batch requests through the application, in this process, without a socket.

The application is the one that serves, so validation, chat templates and errors are the same. Every input line gets exactly one
output line, as soon as it is done; a killed run continues with ``--resume``.
"""


from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from presage.core.config import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig, SchedulerConfig, SpeculationConfig, StructuredOutputsConfig
from presage.core.errors import ConfigError
from presage.serve.cli import Cache, Executor, Model, Scheduler, Speculation, Structured, app, engine_config
from presage.serve.config import ServerConfig

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


@app.command(name="run-batch")
def run_batch(
    model_name: Annotated[str, Parameter(name="MODEL")] = "",
    /,
    *,
    input_file: Annotated[str, Parameter(name=["--input-file", "-i"])],
    output_file: Annotated[str, Parameter(name=["--output-file", "-o"])],
    resume: bool = False,
    model: Model = ModelConfig(),
    cache: Cache = CacheConfig(),
    scheduler: Scheduler = SchedulerConfig(),
    executor: Executor = ExecutorConfig(),
    speculation: Speculation = SpeculationConfig(),
    structured: Structured = StructuredOutputsConfig(),
) -> int:
    """Answer a file of requests in OpenAI's batch format.

    Parameters
    ----------
    model_name:
        Checkpoint folder, .gguf file, hub name, or presage-tiny.
    input_file:
        Lines of {"custom_id", "method", "url", "body"}.
    output_file:
        Lines of {"id", "custom_id", "response", "error"}, in the order in which requests end.
    resume:
        Keep what the output file already answers and do the rest.
    """
    source, target = Path(input_file), Path(output_file)
    if not source.is_file():
        raise ConfigError(f"there is no file {source}", param="input_file")
    done = finished_ids(target) if resume else set()
    if target.exists() and not resume:
        raise ConfigError(f"{target} exists; pass --resume to continue it, or remove it", param="output_file")
    config = engine_config(model_name, model, cache, scheduler, executor, structured, speculation=speculation)
    return asyncio.run(_run(config, source, target, done))


def finished_ids(path: Path) -> set[str]:
    """The custom_ids an output file answers. What will be tried again is dropped from it: bad lines, server errors (5xx), a torn last line."""
    if not path.exists():
        return set()
    kept, ids = [], set()
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row.get("custom_id"), str) and (row.get("response") or {}).get("status_code", 500) < 500:
            kept.append(line if line.endswith("\n") else line + "\n")
            ids.add(row["custom_id"])
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)
    return ids


def fault(line: Any, seen: set[str]) -> str | None:
    """What is wrong with a parsed input line, or None."""
    if not isinstance(line, dict):
        return "a line must be a JSON object"
    if not isinstance(line.get("custom_id"), str):
        return "custom_id must be a string"
    if line["custom_id"] in seen:
        return f"custom_id {line['custom_id']!r} appears twice"
    if line.get("method") != "POST":
        return f"method must be POST, got {line.get('method')!r}"
    if line.get("url") not in URLS:
        return f"url must be one of {', '.join(URLS)}, got {line.get('url')!r}"
    if not isinstance(line.get("body"), dict):
        return "body must be a JSON object"
    return "a batch cannot stream" if line["body"].get("stream") else None


def answer(custom_id: Any, response: dict[str, Any] | None, code: str | None = None, message: str = "") -> dict[str, Any]:
    """One output line."""
    error = None if code is None else {"code": code, "message": message}
    return {"id": f"batch_req_{uuid.uuid4().hex[:24]}", "custom_id": custom_id, "response": response, "error": error}


class Batch:
    """The work of one run: lines are read as workers become free, and written as they end."""

    def __init__(self, client: Any, source: Path, target: Path, done: set[str]) -> None:
        self.client, self.target, self.done = client, target, done
        self.lines = self._lines(source)
        self.ok = self.failed = self.skipped = 0
        self.tty = sys.stderr.isatty()

    def _lines(self, source: Path) -> Iterator[tuple[int, str]]:
        with source.open(encoding="utf-8", errors="replace") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())

    async def worker(self, out: Any, seen: set[str]) -> None:
        """Take lines until there are none."""
        for number, text in self.lines:
            row = await self.one(number, text, seen)
            if row is None:
                self.skipped += 1
                continue
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            self.ok, self.failed = self.ok + (row["error"] is None), self.failed + (row["error"] is not None)
            if self.tty:
                print(f"\r{self.ok + self.failed} done, {self.failed} failed", end="", file=sys.stderr, flush=True)

    async def one(self, number: int, text: str, seen: set[str]) -> dict[str, Any] | None:
        """The output line of an input line; None if it is already answered."""
        try:
            line = json.loads(text)
        except ValueError as error:
            return answer(None, None, "invalid_line", f"line {number}: not JSON: {error}")
        why = fault(line, seen)
        custom_id: Any = line.get("custom_id") if isinstance(line, dict) else None
        if why is not None:
            return answer(custom_id, None, "invalid_line", f"line {number}: {why}")
        seen.add(custom_id)
        if custom_id in self.done:
            return None
        reply = await self.client.post(line["url"], json=line["body"])
        try:
            body = reply.json()
        except ValueError:  # a fault outside our error handlers answers in plain text
            body = {"error": {"code": "internal_error", "message": reply.text}}
        response = {"status_code": reply.status_code, "request_id": reply.headers.get("x-request-id", ""), "body": body}
        if reply.status_code == 200:
            return answer(custom_id, response)
        refusal = body.get("error") or {}
        return answer(custom_id, response, str(refusal.get("code")), str(refusal.get("message")))


async def _run(config: EngineConfig, source: Path, target: Path, done: set[str]) -> int:
    import httpx

    from presage.engine.async_llm import AsyncLLM
    from presage.serve.api import create_app

    engine = await asyncio.to_thread(AsyncLLM, config, sys.stderr.isatty())
    try:
        transport = httpx.ASGITransport(create_app(engine, ServerConfig()), raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            batch, seen = Batch(client, source, target, done), set[str]()
            # Twice the seats keep the engine's queue filled; the file itself is never in memory.
            workers = min(2 * config.scheduler.max_num_seqs, config.scheduler.max_waiting)
            with target.open("a", encoding="utf-8") as out:
                await asyncio.gather(*(batch.worker(out, seen) for _ in range(workers)))
    finally:
        await asyncio.to_thread(engine.shutdown)
    skipped = f", {batch.skipped} were already answered" if done else ""
    lead = "\n" if batch.tty else ""
    print(f"{lead}{batch.ok} answered, {batch.failed} failed{skipped}: {target}", file=sys.stderr)
    return 0
