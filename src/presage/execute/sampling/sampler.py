"""The sampler: decides the new tokens of a step from its logits, and is the companion that remembers what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage import verify
from presage.core.errors import StepFailed
from presage.core.plan import StepPlan, Verdict
from presage.core.request import TokenLogprobs
from presage.core.types import Ints, Singles
from presage.execute.sampling.logprobs import token_logprobs
from presage.execute.sampling.noise import Noise
from presage.execute.sampling.rows import Rows
from presage.execute.sampling.state import SamplingState
from presage.execute.sampling.steps import Step, default_steps


@dataclass(slots=True)
class Judged:
    """Ids decided per span (``new_off`` [S+1], ``new``), accepted node indices within the span (``path_off``, ``path``), and
    log-probabilities by span index for requests that asked."""

    new_off: Ints
    new: Ints
    path_off: Ints
    path: Ints
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Sampler(SamplingState):
    """Judges logits by the plan's acceptance rule. ``vocab_size``: columns of the logits; ``eos_ids``: suppressed by ``min_tokens``;
    ``engine_seed``: seeds requests that bring none, by their id. ``steps``: what makes the target from raw logits, in order.
    """

    def __init__(
        self, vocab_size: int, eos_ids: Sequence[int] = (), engine_seed: int = 0, *, steps: tuple[Step, ...] | None = None
    ) -> None:
        super().__init__(vocab_size, eos_ids, engine_seed)
        self.steps = default_steps() if steps is None else steps

    @property
    def state(self) -> SamplingState:
        """The per-request state: the sampler is its own companion."""
        return self

    def judge(self, logits: Any, plan: StepPlan, row_span: Ints, row_node: Ints, masks: Any = None) -> Judged:
        """Decide ids. ``logits`` float32 [R, V] (tensor or array): row r belongs to span ``row_span[r]``, after node ``row_node[r]`` of it
        (-1: after its last known token). ``masks``: (rows [k], int32 bits [k, ceil(V/32)]), grammar masks by logits row.

        Raises StepFailed if some spans cannot be decided (NaN or +inf logits, empty support). Its ``details``: ``slots``, and ``judged``
        with the decisions of all other spans, which are valid.
        """
        x = as_rows(logits)
        rows = Rows(x, plan, (np.asarray(row_span), np.asarray(row_node)), self, self.steps, masks)
        noise = Noise(self.seed[plan.slot], rows.base)
        verdict = verify.get(plan.rule).judge(rows, plan.draft, noise)
        judged = Judged(verdict.off, verdict.ids, verdict.path_off, verdict.path)
        if (self.logprobs[plan.slot] >= 0).any():
            judged.logprobs = self._logprobs(rows, verdict)
        if rows.failed:
            slots = sorted({int(plan.slot[s]) for s in rows.failed})
            reasons = "; ".join(f"slot {int(plan.slot[s])}: {why}" for s, why in sorted(rows.failed.items()))
            raise StepFailed(f"cannot choose a token: {reasons}", slots=slots, judged=judged)
        return judged

    def prompt_logprobs(self, logits: Any, plan: StepPlan, span: int, row: int = 0) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt's own ids: row i of ``logits`` [n, V] is the span's row ``row`` + i and predicts the id after it.

        Rows whose next id is not part of the prompt give no entry.
        """
        slot = int(plan.slot[span])
        if slot not in self._lists:
            return []  # closed while the step ran: nobody will read it
        first = int(plan.start[span]) + row + 1
        ids = np.asarray(self.lists(slot).prompt[first : first + len(logits)], np.int32)
        return token_logprobs(as_rows(logits)[: len(ids)], ids, max(0, int(self.prompt_k[slot])))

    def _logprobs(self, rows: Rows, verdict: Verdict) -> dict[int, list[TokenLogprobs]]:
        out = {}
        for s in rows.spans.tolist():
            ids = verdict.ids[verdict.off[s] : verdict.off[s + 1]]
            k = int(self.logprobs[rows.slot[s]])
            if k < 0 or not len(ids):
                continue
            # The row that decided an id stands after the accepted node before it.
            before = np.concatenate([[-1], verdict.path[verdict.path_off[s] : verdict.path_off[s + 1]]])[: len(ids)].astype(np.int32)
            at = rows.index(np.full(len(ids), s, np.int32), before)
            out[s] = token_logprobs(rows.logits[at], ids, k)
        return out


def as_rows(logits: Any) -> Singles:
    """Logits as a contiguous float32 array on the host, without a copy where they are one already."""
    if not isinstance(logits, np.ndarray):
        logits = logits.detach().float().cpu().numpy()
    return np.ascontiguousarray(logits, np.float32)
