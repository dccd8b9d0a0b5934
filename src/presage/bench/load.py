"""The open-loop generator: every request is sent when the schedule says so, however slow the server is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urljoin

import aiohttp
import numpy as np

from presage.bench.client import stream_request
from presage.bench.config import ServeBench
from presage.bench.datasets import Sample
from presage.bench.measures import Record
from presage.core.errors import ConfigError


def request_body(sample: Sample, config: ServeBench, seed: int) -> dict[str, Any]:
    """The JSON of one request. Completions get ids, so that the prompt's length is exact; chat gets text."""
    body: dict[str, Any] = {
        "model": config.served_model_name or config.model,
        "max_tokens": sample.max_tokens,
        "temperature": config.temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.is_chat:
        body["messages"] = [{"role": "user", "content": sample.text}]
    else:
        body["prompt"] = sample.ids if config.prompt_ids else sample.text
    return {**body, **config.extra_body}


def session(config: ServeBench) -> aiohttp.ClientSession:
    """A client session without limits of its own: a cap on connections would silently close the loop."""
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout = aiohttp.ClientTimeout(total=config.request_timeout)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout)


def endpoint(config: ServeBench) -> str:
    """The full address requests go to."""
    return urljoin(config.base_url.rstrip("/") + "/", config.path.lstrip("/"))


async def wait_ready(client: aiohttp.ClientSession, config: ServeBench, body: dict[str, Any]) -> None:
    """Repeat one request until it succeeds. Raises ConfigError with the last failure after ``ready_check_timeout_sec`` seconds."""
    until = time.monotonic() + config.ready_check_timeout_sec
    while True:
        record = await stream_request(client, endpoint(config), body, Record(time.monotonic()))
        if record.ok:
            return
        if time.monotonic() >= until:
            raise ConfigError(f"{endpoint(config)} does not answer: {record.error}", param="base_url")
        await asyncio.sleep(0.5)


async def offer(client: aiohttp.ClientSession, config: ServeBench, bodies: Sequence[dict[str, Any]], at: np.ndarray) -> list[Record]:
    """Send ``bodies[i]`` at ``at[i]`` seconds from now; returns the records in that order.

    ``max_concurrency`` holds requests back, but their clock still starts at the scheduled time: the wait stays in TTFT.
    """
    gate = asyncio.Semaphore(config.max_concurrency or len(bodies) or 1)
    start = time.monotonic()
    records = [Record(start + t) for t in at.tolist()]

    async def one(body: dict[str, Any], record: Record) -> None:
        await asyncio.sleep(max(0.0, record.t_sched - time.monotonic()))
        async with gate:
            await stream_request(client, endpoint(config), body, record)

    await asyncio.gather(*(one(b, r) for b, r in zip(bodies, records, strict=True)))
    return records


async def run_load(config: ServeBench, samples: Sequence[Sample], at: np.ndarray) -> list[Record]:
    """Readiness, warm-up, then the measured run."""
    bodies = [request_body(s, config, config.seed + i) for i, s in enumerate(samples)]
    async with session(config) as client:
        if config.ready_check_timeout_sec > 0:
            await wait_ready(client, config, {**bodies[0], "max_tokens": 1} if bodies else {})
        for i in range(config.num_warmups):
            await stream_request(client, endpoint(config), bodies[i % len(bodies)], Record(time.monotonic()))
        return await offer(client, config, bodies, at)
