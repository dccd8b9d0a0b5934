"""Soak: thousands of mixed requests with random aborts and one killed engine; every request is answered once and every block comes back.

    python benchmarks/soak.py --requests 10000

Mix: greedy and sampled, n > 1, stop strings, penalties, log-probabilities, shared prefixes, JSON schemas, embeddings, priorities, refusals.
Exit status 0 only if all hold: each branch ended exactly once, offsets gapless, no block referenced, nothing running or waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from presage.core.config import EngineConfig
from presage.core.errors import PresageError, RequestError
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams, StructuredOutputsParams
from presage.core.types import Kind
from presage.engine.remote import RemoteEngine

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def mixed(rng: random.Random, i: int) -> Request:
    """One random request."""
    shared = [50 + j % 90 for j in range(rng.choice([0, 0, 64, 128]))]
    prompt = np.array(shared + [rng.randrange(4, 4000) for _ in range(rng.choice([1, 5, 20, 60, 200]))], np.int32)
    kind = rng.random()
    name, fields = f"soak-{i}", {"priority": rng.randrange(3), "arrival": time.monotonic()}
    if kind < 0.05:
        return Request(id=name, prompt=prompt, kind=Kind.EMBED, **fields)
    if kind < 0.07:
        return Request(id=name, prompt=np.arange(5000, dtype=np.int32) % 4000, **fields)
    p: dict[str, Any] = {"max_tokens": rng.choice([1, 4, 12, 24, 60]), "temperature": rng.choice([0.0, 0.7, 1.0])}
    if kind < 0.12:
        p["structured_outputs"] = StructuredOutputsParams(json=SCHEMA)
    elif kind < 0.22:
        p |= {"n": rng.choice([2, 3])}
    elif kind < 0.32:
        p |= {"stop": ["e", "the"], "top_p": 0.9}
    elif kind < 0.42:
        p |= {"repetition_penalty": 1.2, "logprobs": 2, "seed": i}
    return Request(id=name, prompt=prompt, sampling=SamplingParams(**p), **fields)


async def one(engine: RemoteEngine, req: Request, abort_after: float | None, tally: Counter[str]) -> None:
    """Run a request to its end (or abandon it) and check what came."""
    sent: dict[int, int] = {}
    ends: Counter[int] = Counter()
    stream = engine.submit(req)
    try:
        async with asyncio.timeout(abort_after):
            async for e in stream:
                if e.ids and e.offset != sent.get(e.branch, 0):
                    tally["gap"] += 1
                sent[e.branch] = sent.get(e.branch, 0) + len(e.ids)
                ends[e.branch] += bool(e.finish)
    except TimeoutError:
        tally["aborted"] += 1
        return
    except RequestError:
        tally["refused"] += 1
        return
    except PresageError as error:
        tally[f"error {error.code}"] += 1
        if tally[f"error {error.code}"] < 4:
            print(error.message, file=sys.stderr)
        return
    finally:
        await stream.aclose()
    good = len(ends) == req.sampling.n and all(v == 1 for v in ends.values())
    tally["finished" if good else "WRONG"] += 1


async def soak(count: int, concurrency: int, seed: int, model: str) -> int:
    """The whole run; returns the exit status."""
    rng, tally = random.Random(seed), Counter[str]()
    engine = RemoteEngine(EngineConfig.of(model=model, kv_cache_memory="24MiB", max_num_seqs=48, max_model_len=1024, max_waiting=512))
    await engine.start()
    gate, began, kill_at = asyncio.Semaphore(concurrency), time.monotonic(), count // 2

    async def guarded(i: int) -> None:
        async with gate:
            if i == kill_at and engine.process is not None:
                os.kill(engine.process.pid, signal.SIGKILL)
                tally["kills"] += 1
            await one(engine, mixed(rng, i), rng.random() * 0.5 if rng.random() < 0.1 else None, tally)
            done = sum(v for k, v in tally.items() if k != "kills")
            if done % 500 == 0:
                print(f"{done}/{count} in {time.monotonic() - began:.0f} s  {dict(tally)}", file=sys.stderr, flush=True)

    await asyncio.gather(*(guarded(i) for i in range(count)))
    for _ in range(100):
        await asyncio.sleep(0.1)
        stats = engine.stats()
        if not (stats["running"] or stats["waiting"] or stats["used_blocks"]):
            break
    answered = sum(v for k, v in tally.items() if k != "kills")
    clean = not (stats["running"] or stats["waiting"] or stats["used_blocks"]) and engine.failure is None
    ok = clean and answered == count and not tally["WRONG"] and not tally["gap"] and not any(k.startswith("error") for k in tally)
    print(f"soak: {count} requests, {time.monotonic() - began:.0f} s, {dict(tally)}, restarts {stats['engine_restarts']}")
    print(
        f"soak: running {stats['running']}, waiting {stats['waiting']}, used blocks {stats['used_blocks']}, "
        f"policy errors {stats['policy_errors']}, faults {stats['faults']}"
    )
    print("soak: PASSED" if ok else "soak: FAILED")
    await engine.close()
    return 0 if ok else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="presage-tiny")
    args = parser.parse_args()
    return asyncio.run(soak(args.requests, args.concurrency, args.seed, args.model))


if __name__ == "__main__":
    sys.exit(main())
