"""A drafter's own pass: what a draft model (or the target's first layers) proposes next, from its logits.

Its rows go through the request's own sampling steps, so that temperature, penalties and cuts shape the guess as they shape the target. Under
rules that draw with keyed noise the guess is drawn with the *same* noise: where both models agree they then draw the same token (the Gumbel
coupling, which no inverse CDF gives). Under rejection-type rules it is drawn with noise of its own, and the row it came from is kept.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit

from presage.core.plan import StepPlan
from presage.core.types import EMPTY, Ints, Singles, Want
from presage.execute.sampling.noise import Noise, gumbel
from presage.execute.sampling.rows import Rows

_TOPK = int(Want.TOPK)
PROPOSE = 3
"""Purpose of a proposal's noise: neither the target's draw nor the coins that judge it may know it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a pass is asked for, in ``StepPlan.work``: ``width`` tokens per row. ``draws``: "" = the likeliest under the target's own noise;
    "with" or "without" replacement = real draws, with the rows they came from; "mode" = the likeliest without any noise. ``fresh``: what
    the bank still holds of these slots is forgotten first."""

    width: int = 1
    draws: str = ""
    fresh: bool = False


@dataclass(slots=True)
class Proposed:
    """``ids`` [R, width] (-1: nothing left to propose), ``prob`` [R, width]: the drafter's probability of each token; for draws that of its
    likeliest one, which does not tell what was drawn. ``q`` [R, V]: the rows draws came from."""

    ids: Ints
    prob: Singles
    q: Singles | None = None


@njit("void(f4[:,::1],f4[:,::1],i4[:,::1],f4[:,::1])", cache=True, nogil=True, error_model="numpy")
def _top(z, score, ids, prob):
    """Per row the ids of the largest scores, best first, ties to the lower id, and their softmax in ``z``."""
    width = ids.shape[1]
    best = np.empty(width, np.float32)
    for r in range(len(z)):
        peak, total, n = np.float32(-np.inf), np.float64(0), 0
        for i in range(z.shape[1]):
            peak = max(peak, z[r, i])
        ids[r, :] = -1
        prob[r, :] = 0
        if not np.isfinite(peak):
            continue
        for i in range(z.shape[1]):
            total += np.exp(z[r, i] - peak)
            s = score[r, i]
            if s == -np.inf or (n == width and s <= best[n - 1]):
                continue
            k = n if n < width else width - 1
            n = min(n + 1, width)
            while k > 0 and best[k - 1] < s:
                best[k], ids[r, k] = best[k - 1], ids[r, k - 1]
                k -= 1
            best[k], ids[r, k] = s, i
        for k in range(n):
            prob[r, k] = np.exp(z[r, ids[r, k]] - peak) / total


def pass_rows(plan: StepPlan) -> tuple[Ints, Ints, Ints]:
    """Rows that propose, with their span and node (-1 = the span's last known token): of TOPK spans the last known row and all node rows."""
    spans = np.flatnonzero(plan.want & _TOPK)
    first = plan.rows[spans] + np.maximum(plan.count[spans] - 1, 0)
    per = plan.rows[spans + 1] - first
    span = np.repeat(spans, per).astype(np.int32)
    place = np.arange(len(span)) - np.repeat(np.cumsum(per) - per, per)
    # A pass computes a span's newest nodes: they are the last ones of its tree.
    node = np.repeat(plan.nodes[spans] - per, per) + place
    return (np.repeat(first, per) + place).astype(np.int32), span, node.astype(np.int32)


def propose(logits: torch.Tensor, plan: StepPlan, span: Ints, node: Ints, sampler: Any) -> Proposed:
    """Tokens to try after each row of ``logits`` [R, V]. ``sampler``: execute.sampling.Sampler, whose per-request state shapes the rows."""
    ask: Ask = plan.work[0]
    x = np.ascontiguousarray(logits.detach().float().cpu().numpy())
    rows = Rows(x, plan, (span, node), sampler, sampler.steps, None)
    noise = Noise(sampler.seed[plan.slot], rows.base)
    if ask.draws in ("with", "without"):
        return _draw(rows, noise, span, node, ask)
    z = rows.modified(span, node)
    keys, score = noise.keys(span, rows.depth(span, node)), z
    hot = np.flatnonzero(rows.sampled(span)) if not ask.draws else EMPTY
    if len(hot):
        score, ids = z.copy(), np.arange(z.shape[1], dtype=np.int32)
        for r in hot.tolist():
            score[r] += gumbel(int(keys[r]), ids)
    return _best(z, score, ask.width)


def _best(z: Singles, score: Singles, width: int) -> Proposed:
    out = Proposed(np.empty((len(z), width), np.int32), np.empty((len(z), width), np.float32))
    _top(z, score, out.ids, out.prob)
    return out


def _draw(rows: Rows, noise: Noise, span: Ints, node: Ints, ask: Ask) -> Proposed:
    q = rows.probs(span, node).astype(np.float32)
    depth, ids = rows.depth(span, node), np.full((len(q), ask.width), -1, np.int32)
    for r in np.flatnonzero(q.max(axis=1) > 0).tolist():
        s, d, weights = int(span[r]), int(depth[r]), q[r].astype(np.float64)
        for k in range(ask.width):
            if ask.draws == "with":
                ids[r, k] = noise.choose(weights, s, d, PROPOSE + 8 * k)
            elif weights.any():
                # Taking out what was drawn and drawing again under the same noise is drawing without replacement.
                ids[r, k] = noise.choose(weights, s, d, PROPOSE)
                weights[ids[r, k]] = 0.0
    return Proposed(ids, np.repeat(q.max(axis=1)[:, None], ask.width, axis=1), q)
