"""Block verification (Sun et al., "Block verification accelerates speculative decoding", 2024): judge a chain as a whole.

P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i)) is the joint ratio so far. Of all lengths the longest whose coin says so is kept, so a token that
token-wise rejection would have lost can be saved by those after it: exact, and never accepts less on average.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from presage.core.plan import Draft, Verdict
from presage.core.types import Floats
from presage.execute.sampling.noise import RESIDUAL
from presage.verify.rejection import Rejection, Trial, _trials, allowed
from presage.verify.walk import ends, verdict_of


class Block(Rejection):
    """Implements ``core.protocols.AcceptanceRule`` for chains of sampled and point-mass drafts; trees are judged as by ``rejection``."""

    def judge(self, rows: Any, draft: Draft, noise: Any) -> Verdict:
        """``rows``: execute.sampling.Rows, ``noise``: execute.sampling.Noise."""
        trials = _trials(draft)
        q = None if draft.q is None else np.asarray(draft.q, np.float64)
        ids, paths = dict[int, list[int]](), dict[int, list[int]]()
        for s in rows.spans.tolist():
            nodes = int(draft.offset[s + 1] - draft.offset[s]) if len(draft) else 0
            chain = _chain(trials, s, nodes)
            ids[s], paths[s] = self._tree(rows, noise, s, trials, q) if chain is None else self._block(rows, noise, s, chain, q)
        for s in rows.failed:
            ids.pop(s, None)
            paths.pop(s, None)
        return verdict_of(len(rows.slot), paths, ids)

    def _block(self, rows: Any, noise: Any, span: int, chain: list[Trial], q: Floats | None) -> tuple[list[int], list[int]]:
        """Ids and accepted nodes of a chain, which is no longer than the text may get."""
        over = next((i for i, (node, _, _) in enumerate(chain) if ends(rows, span, node)), len(chain))
        keep, left = _coins(rows, span, chain[: over + 1], q)
        if span in rows.failed:
            return [], []
        n = len(keep) - 1
        while n > 0 and not noise.uniform(span, n - 1) < keep[n]:
            n -= 1
        path = [node for node, _, _ in chain[:n]]
        kept = [token for _, token, _ in chain[:n]]
        if n > over:
            return kept, path
        if n < len(left):
            last = noise.choose(left[n], span, n, RESIDUAL)
        else:
            last = int(rows.draw(np.array([span], np.int32), np.array([path[-1] if path else -1], np.int32), noise)[0])
        return [*kept, last], path


def _coins(rows: Any, span: int, chain: list[Trial], q: Floats | None) -> tuple[list[float], list[Floats]]:
    """For each n: the probability of keeping n tokens if no more are kept, and the weights of the correction that follows them.

    A sampled token that the target does not allow ends the chain before it, as if it had been pruned; what follows the last entry is a draw
    from the target. After a point mass of probability 0 nothing can be kept, and rows there need not make sense.
    """
    ratio, before, keep, left = 1.0, -1, list[float](), list[Floats]()
    for node, token, row in chain:
        p = rows.probs(np.array([span], np.int32), np.array([before], np.int32))[0]
        if span in rows.failed:
            return keep, left
        if row >= 0 and p[token] <= 0:
            break
        over = ratio * p
        if row < 0 or q is None:
            chance = 1.0
            over[token] = 0.0  # ratio * p never exceeds the 1 that a point mass has there
        else:
            proposal = allowed(q[row], p)
            chance = float(proposal[token])
            over = np.maximum(over - proposal, 0.0)
        mass = float(over.sum())
        keep.append(mass / (mass + 1 - ratio) if mass + 1 - ratio > 0 else 1.0)
        left.append(over if mass > 0 else p)
        ratio = min(1.0, ratio * float(p[token]) / chance) if chance > 0 else 0.0
        before = node
        if ratio == 0.0:
            return keep, left
    return [*keep, ratio], left


def _chain(trials: dict[tuple[int, int], list[Trial]], span: int, nodes: int) -> list[Trial] | None:
    """The span's trials in order if its draft is one chain with one proposal per node, else None."""
    chain: list[Trial] = []
    while found := trials.get((span, chain[-1][0] if chain else -1)):
        if len(found) > 1:
            return None
        chain.append(found[0])
    return chain if len(chain) == nodes else None
