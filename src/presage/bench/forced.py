"""Recorded outputs as if the model had said them: the engine's work is real, logits and all, only the choice of tokens is not.

So a drafter can be measured on what people and agents really produced with any weights, random ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import StepPlan
from presage.core.request import Request
from presage.core.types import Ints
from presage.execute.sampling.noise import Noise
from presage.execute.sampling.rows import Rows
from presage.execute.sampling.sampler import Judged, Sampler, as_rows
from presage.verify.walk import walk

FORCED = "forced"
"""Key in ``Request.extras``: int32 ids of the output."""


class ForcedRows(Rows):
    """Rows whose draws are recorded ids; the real draw is made as well, and dropped."""

    outputs: dict[int, Ints]
    prompts: dict[int, int]

    def draw(self, spans: Ints, nodes: Ints, noise: Noise) -> Ints:
        """The recorded id at each place; the real one beyond the end of the record."""
        drawn = super().draw(spans, nodes, noise)
        depth = self.depth(spans, nodes)
        for i, span in enumerate(spans.tolist()):
            slot = int(self.slot[span])
            place = int(self.base[span]) + int(depth[i]) - self.prompts[slot]
            if place < len(self.outputs[slot]):
                drawn[i] = self.outputs[slot][place]
        return drawn


class ForcedSampler(Sampler):
    """A sampler for requests that bring their output in ``extras["forced"]``. Chains and trees; no grammar, no logprobs."""

    def __init__(self, vocab_size: int, eos_ids: Sequence[int] = (), engine_seed: int = 0) -> None:
        super().__init__(vocab_size, eos_ids, engine_seed)
        self.outputs: dict[int, Ints] = {}
        self.prompts: dict[int, int] = {}

    def open(self, slot: int, req: Request) -> None:
        """Raises ConfigError for ids outside the vocabulary."""
        super().open(slot, req)
        forced = np.asarray(req.extras.get(FORCED, ()), np.int32)
        if len(forced) and (forced.min() < 0 or forced.max() >= self.vocab_size):
            raise ConfigError(f"a recorded id is outside the vocabulary of {self.vocab_size}", param=FORCED)
        self.outputs[slot], self.prompts[slot] = forced, len(req.prompt)

    def judge(self, logits: Any, plan: StepPlan, row_span: Ints, row_node: Ints, masks: Any = None) -> Judged:
        """As the keyed rule, with recorded ids for draws."""
        rows = ForcedRows(as_rows(logits), plan, (np.asarray(row_span), np.asarray(row_node)), self, self.steps, masks)
        rows.outputs, rows.prompts = self.outputs, self.prompts
        verdict = walk(rows, plan.draft, Noise(self.seed[plan.slot], rows.base))
        return Judged(verdict.off, verdict.ids, verdict.path_off, verdict.path)
