"""Typical acceptance (Cai et al., "Medusa", 2024): keep a draft that is likely enough for how certain the target is. Lossy.

Tokens are kept where p(x) > min(eps, delta * exp(-H(p))): an uncertain target takes many continuations, a certain one few. What is kept
is not drawn from the target, so its distribution changes; greedy requests stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from presage.core.plan import Draft, Verdict
from presage.core.types import Floats, Ints
from presage.verify.lossy import lossy_walk


@dataclass(frozen=True)
class Typical:
    """``posterior_threshold`` eps, ``posterior_alpha`` delta (vLLM's names). With eps = 1 and an infinite delta nothing is kept: ``keyed``."""

    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3

    @property
    def lossless(self) -> bool:
        """Only at the identity point."""
        return self.posterior_threshold >= 1 and self.posterior_alpha == np.inf

    @property
    def seed_stable(self) -> bool:
        """Only at the identity point."""
        return self.lossless

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict:
        """``rows``: execute.sampling.Rows, ``noise``: execute.sampling.Noise."""

        def keeps(span: int, node: int, children: Ints) -> Floats:
            p = rows.probs(np.array([span], np.int32), np.array([node], np.int32))[0]
            some = p[p > 0]
            floor = min(self.posterior_threshold, self.posterior_alpha * float(np.exp((some * np.log(some)).sum())))
            mine = p[draft.token[children]]
            return np.where(mine > floor, np.log(np.maximum(mine, np.finfo(np.float64).tiny)), -np.inf)

        return lossy_walk(rows, draft, noise, keeps)
