"""What the front notes of one request's time. The front's clock and the engine's are both ``time.monotonic`` of one machine."""

from __future__ import annotations

import math
from collections.abc import Callable

from presage.core.request import Emission, Request
from presage.serve.metrics import Metrics


class Timing:
    """Feeds the histograms of one request."""

    def __init__(self, metrics: Metrics, request: Request, clock: Callable[[], float]) -> None:
        self.metrics, self.request, self.clock = metrics, request, clock
        self.start = request.arrival
        self.first = self.last = 0.0
        self.times = (0.0, 0.0, 0.0)

    def note(self, e: Emission, n_ids: int, finish: str) -> None:
        """An emission that the client will see."""
        now = self.clock()
        if n_ids and not self.first:
            self.first = now
            self.metrics.first_token.observe(now - self.start)
        elif n_ids:
            self.metrics.inter_token.observe(now - self.last)
        self.last = now
        self.metrics.generation_tokens.inc(n_ids)
        if e.times[2]:
            self.times = e.times
        if finish:
            self.metrics.finished(finish)

    def close(self, n_prompt: int, n_output: int, over: bool) -> None:
        """The request ended; ``over`` if all its branches did."""
        if not over or not self.first:
            return
        m, n_each = self.metrics, n_output / self.request.sampling.n
        m.whole.observe(self.last - self.start)
        m.decode.observe(self.last - self.first)
        m.prompt_tokens.inc(n_prompt)
        m.prompt_size.observe(n_prompt)
        m.output_size.observe(n_output)
        # From the engine's own stamps: the front cannot see when a request was first scheduled.
        arrival, scheduled, first = self.times
        if first:
            m.queue.observe(max(0.0, scheduled - arrival))
            m.prefill.observe(max(0.0, first - scheduled))
        each = (self.last - self.first) / (n_each - 1) if n_each > 1 else 0.0
        if n_each > 1:
            m.per_token.observe(each)
        self._slo(each)

    def _slo(self, each: float) -> None:
        r = self.request
        if min(r.due_first, r.due_each, r.due_end) < math.inf:
            self.metrics.met_slo(self.first <= r.due_first and each <= r.due_each and self.last <= r.due_end)
