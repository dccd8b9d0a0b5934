"""Requests of which only lengths or block hashes are known, as arrays. Recorded traces are read by ``bench.workloads``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.simulate.oracle import block_ids, synthetic_base, synthetic_ids


@dataclass(frozen=True)
class LengthTrace:
    """Arrival times (s, ascending), prompt and output lengths (tokens) [n]; ``hashes[i]`` names the prompt's ``block``-token blocks.

    Iterating makes the requests one by one: contents are made from the name or the hashes, outputs have exactly their length.
    """

    arrival: np.ndarray
    n_in: np.ndarray
    n_out: np.ndarray
    hashes: list[list[int]] | None = None
    block: int = 512
    name: str = "r"

    def __len__(self) -> int:
        return len(self.arrival)

    def __iter__(self) -> Iterator[Request]:
        times, prompts, outputs = self.arrival.tolist(), self.n_in.tolist(), self.n_out.tolist()
        # Parameters are read only, and checking them costs more than anything else here: equal ones are one object.
        params = {n: SamplingParams(max_tokens=n, ignore_eos=True) for n in set(outputs)}
        for i in range(len(times)):
            name = f"{self.name}{i}"
            known = None if self.hashes is None else np.array(self.hashes[i])
            ids = synthetic_ids(synthetic_base(name), 0, prompts[i]) if known is None else block_ids(known, prompts[i], self.block)
            yield Request(id=name, prompt=ids, sampling=params[outputs[i]], arrival=times[i])

    def scaled(self, rate: float) -> LengthTrace:
        """The same requests ``rate`` times as fast."""
        return LengthTrace(self.arrival / rate, self.n_in, self.n_out, self.hashes, self.block, self.name)

    def first(self, n: int) -> LengthTrace:
        """The first ``n`` requests."""
        return LengthTrace(self.arrival[:n], self.n_in[:n], self.n_out[:n], self.hashes and self.hashes[:n], self.block, self.name)
