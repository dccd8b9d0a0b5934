"""Keyed draws, the default rule: draw each token from its target with noise fixed by (seed, position); accept a draft iff it is that token.

Lossless, and the tokens are those of a run without drafts: neither what was drafted nor the load can change them. At temperature 0 the draw
is the argmax, so greedy decoding is the same rule. Chains and trees alike (H2 of the design: any pruning is exact).
"""

from __future__ import annotations

from typing import Any

from presage.core.plan import Draft, Verdict
from presage.verify.walk import walk


class Keyed:
    """Implements ``core.protocols.AcceptanceRule``."""

    lossless = True
    seed_stable = True

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict:
        """``rows``: execute.sampling.Rows, ``noise``: execute.sampling.Noise."""
        return walk(rows, draft, noise)
