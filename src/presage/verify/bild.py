"""BiLD (Kim et al., "Speculative decoding with Big Little Decoder", NeurIPS 2023) as an acceptance rule. Lossy, with two dials.

Fallback: where the small model is not sure of its token, the large one decides. Rollback: a token of which the small model was sure is
undone if the large one finds it too unlikely. A draft is never shown before it is judged, so nothing is taken back from a client, and a
token on which both agree costs no rollback, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.core.plan import Draft, Verdict
from presage.core.types import Floats, Ints
from presage.verify.lossy import lossy_walk


@dataclass(frozen=True)
class Bild:
    """``fallback_threshold``: the small model decides only above this confidence, its ``prob`` given the parent's; at 1 it never does: ``keyed``.

    ``rollback_threshold``: nats; a sure token is kept while -log p(x) under the large model is at most this. Greedy requests are judged by
    the large model's softmax too, as in the paper, hence lossy.
    """

    fallback_threshold: float = 0.6
    rollback_threshold: float = 5.0

    @property
    def lossless(self) -> bool:
        """Only at the identity point."""
        return self.fallback_threshold >= 1

    @property
    def seed_stable(self) -> bool:
        """Only at the identity point."""
        return self.lossless

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict:
        """``rows``: execute.sampling.Rows, ``noise``: execute.sampling.Noise."""
        sure = confidence(draft) > self.fallback_threshold

        def keeps(span: int, node: int, children: Ints) -> Floats:
            if not sure[children].any():
                return np.full(len(children), -np.inf)
            z = rows.modified(np.array([span], np.int32), np.array([node], np.int32))[0].astype(np.float64)
            if not np.isfinite(z.max()):
                return np.full(len(children), -np.inf)  # nothing may follow: the draw after this node reports it
            log_p = z[draft.token[children]] - z.max() - np.log(np.exp(z - z.max()).sum())
            return np.where(sure[children] & (log_p >= -self.rollback_threshold), log_p, -np.inf)

        return lossy_walk(rows, draft, noise, keeps)


def confidence(draft: Draft) -> Floats:
    """The drafter's probability of each node [N] given that its parent holds, at most 1."""
    spans = np.repeat(np.arange(len(draft.offset) - 1), np.diff(draft.offset))
    up = draft.prob[draft.offset[spans] + np.maximum(draft.parent, 0)].astype(np.float64)
    above = np.where(draft.parent < 0, 1.0, up)
    return np.minimum(np.divide(draft.prob, above, out=np.zeros(len(draft)), where=above > 0), 1.0)
