"""A loop over the null executor, with a virtual clock, for property tests and measurements."""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.cache.manager import BlockManager
from presage.core.config import EngineConfig
from presage.core.events import Arrive
from presage.core.request import Emission, Request
from presage.core.sampling_params import SamplingParams
from presage.core.table import Table
from presage.engine.cutter import Cutter
from presage.engine.emitter import Emitter
from presage.engine.loop import Loop
from presage.engine.null import NullExecutor, null_geometry
from presage.engine.replay import loop_config
from presage.schedule import make_scheduler


class Bench:
    """A loop, its executor and everything it emitted."""

    def __init__(
        self,
        blocks: int = 64,
        windows: tuple[int, ...] = (0,),
        max_len: int = 512,
        eos: tuple[int, ...] = (2,),
        log: Any = None,
        executor: Any = None,
        content: Any = None,
        scheduler: Any = None,
        drafter: Any = None,
        length: Any = None,
        max_drafts: int = 0,
        lanes: int = 1,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig.of(**settings)
        geometry = null_geometry(blocks, windows=windows)
        self.executor = executor or NullExecutor(geometry)
        table, requests = Table(8), dict[int, Request]()
        self.emissions: list[Emission] = []
        self.kv = BlockManager(
            geometry,
            max_len=max_len + 64,
            prefix_caching=self.config.cache.enable_prefix_caching,
            content=content,
            max_num_batched_tokens=self.config.scheduler.max_num_batched_tokens,
        )
        more = [BlockManager(geometry, max_len=max_len + 64, prefix_caching=False) for _ in range(lanes - 1)]
        config = loop_config(self.config, max_len)
        config.max_drafts = max_drafts
        self.loop = Loop(
            config,
            self.executor,
            [self.kv, *more],
            scheduler or make_scheduler(self.config.scheduler),
            Cutter(table, requests, list(eos)),
            Emitter(table, requests, self.emissions.extend),
            table=table,
            requests=requests,
            log=log,
            drafter=drafter,
            length=length,
        )
        self.now = 0.0

    def add(self, id: str, prompt: list[int] | int, **params: Any) -> None:
        """Queue a request; an int prompt is a length."""
        fields = {k: params.pop(k) for k in ("priority", "salt", "tenant", "kind", "due_first", "due_end", "sink") if k in params}
        ids = np.arange(3, 3 + prompt, dtype=np.int32) if isinstance(prompt, int) else np.array(prompt, np.int32)
        self.turn(Arrive(Request(id=id, prompt=ids, sampling=SamplingParams(**params), arrival=self.now, **fields)))

    def turn(self, *events: Any) -> Any:
        """One turn with these events and whatever the executor answered."""
        self.now += 0.001
        waiting, self.executor.events = self.executor.events, []
        wake = self.loop.turn(self.now, [*waiting, *events])
        self.loop.emitter.flush()
        return wake

    def drain(self, turns: int = 5000) -> None:
        """Turn until idle."""
        for _ in range(turns):
            if self.loop.idle:
                return
            self.turn()
        raise AssertionError("the loop did not become idle")

    def output(self, id: str, branch: int = 0) -> list[int]:
        """Ids emitted for a request, checked to be gapless."""
        out: list[int] = []
        for e in self.emissions:
            if (e.id, e.branch) == (id, branch):
                assert e.offset == len(out), (e, len(out))
                out += e.ids
        return out

    def finishes(self, id: str) -> list[tuple[int, str]]:
        """(branch, reason) of the terminal emissions."""
        return [(e.branch, e.finish) for e in self.emissions if e.id == id and e.finish]
