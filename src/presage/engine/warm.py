"""First use: run one small request through a new engine, so that every kernel it needs is compiled (once per machine) or loaded.

A line on standard error says so when it takes long; nothing of the request stays behind.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from presage.core.events import Arrive, ResetCache
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.driver import WallDriver

QUIET, EVERY = 1.5, 5.0


def warm_up(driver: WallDriver, vocab_size: int, max_len: int, show: bool) -> float:
    """Run a prompt chunk, decode steps, greedy and sampled. Returns the seconds it took."""
    began, loop = time.monotonic(), driver.loop
    prompt = (np.arange(min(40, max(1, max_len - 4))) % vocab_size).astype(np.int32)
    # A drafter must not remember what nobody asked for.
    forgotten = {"suffix_decoding_max_cached_requests": 0}
    kinds = (SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), SamplingParams(top_p=0.9, top_k=20, max_tokens=2, ignore_eos=True, seed=0))
    with _patience("compiling kernels (once per machine)", show):
        for i, params in enumerate(kinds):
            driver.post(Arrive(Request(id=f"warm-up-{i}", prompt=prompt, sampling=params, sink="warm-up", draft=forgotten)))
        driver.step()
        while not loop.idle:
            driver.step()
    driver.post(ResetCache())
    driver.step()
    for name in loop.stats:
        loop.stats[name] = 0
    loop.speculation.clear()
    return time.monotonic() - began


@contextmanager
def _patience(what: str, show: bool) -> Iterator[None]:
    """Say what is going on after a moment, and that it still is every few seconds."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = QUIET
        while not over.wait(wait):
            print(f"presage: {what}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            wait = EVERY

    if show:
        threading.Thread(target=tell, name="presage-patience", daemon=True).start()
    try:
        yield
    finally:
        over.set()
