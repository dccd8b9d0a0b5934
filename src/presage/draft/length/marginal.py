"""Ours: every candidate node of every request on its own merit.

After drafting, each node has a calibrated probability of being accepted (``acceptance``). All nodes of the batch are ranked by it, and the prefix
of that order with most expected tokens per predicted second is verified (``scan``). Before drafting, requests are asked only if that has
lately been worth what drafting costs (``overhead``); where drafting is dear or must not be pruned, the same scan over expected
acceptance by position says how far to draft. A request or a server for which nothing is worth it asks for nothing at all.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import njit

from presage.core.plan import Draft, Facts, Grants, Keep
from presage.core.protocols import EngineView, LatencyModel
from presage.core.types import Ints, Singles
from presage.draft.length.acceptance import Acceptance
from presage.draft.length.learner import Learner, padded
from presage.draft.length.levels import best_level, chain_depths, level_curve
from presage.draft.length.ready import affordable
from presage.draft.length.scan import CURIOUS, Choice, best_nodes
from presage.draft.length.wishes import Wishes

HOPE = 1.0
RAREST, OFTENEST = 10, 4
CHEAP = 0.01
UNSURE = 0.3
CREDIT = 2.0
EAGER, PATIENT = 0.5, 0.06
BOLD, BOLD_EVERY, KNOWN = 0.25, 64, 2.0
REST = 32


@njit(cache=True, nogil=True)
def _earn(slot, asked, offset, keep, path, price, whole, gain, spread, idle):
    """Move ``gain`` of every asked request towards what its kept nodes are worth less their share of ``price`` (tokens for all rows).

    Returns how many requests had drafts of which nothing is verified although little is known about them (``idle``: which), and
    the mean net worth of those asked.
    """
    kept, n, requests, total = 0, 0, 0, 0.0
    for i in range(len(keep)):
        kept += keep[i]
    for g in range(len(slot)):
        if asked[g] == 0:
            continue
        c, net, mine = slot[g], 0.0, 0
        for i in range(offset[g], offset[g + 1]):
            if keep[i]:
                net += path[i] - price / kept
                mine += 1
        net = max(net, 0.0)
        # Quick to believe in a draft, slow to give up: a match of fifty tokens may follow thirty steps without one.
        gain[c] += (EAGER if net > gain[c] else PATIENT) * (net - gain[c])
        total += net
        requests += 1
        if mine == 0 and offset[g + 1] > offset[g] and not whole[g] and spread[c].max() > UNSURE:
            idle[n] = g
            n += 1
    return n, total / max(requests, 1)


class Marginal:
    """``num_speculative_tokens`` caps the nodes of a request and step. ``explore``: share of the emitted tokens that may be given
    up for drafts that only keep the estimates alive. ``latency``: a model of one's own instead of the learnt one.

    Requests with a latency target (``due_each``) come first: prefixes in which every target is met are preferred (AdaServe's aim).
    """

    def __init__(self, num_speculative_tokens: int = 64, explore: float = 0.005, latency: LatencyModel | None = None, rule: str = "keyed") -> None:
        self.k, self.explore = num_speculative_tokens, explore
        self.learner, self.acceptance = Learner(Wishes(rule), latency), Acceptance()
        self.gain = np.zeros(0)
        self._plain, self._rate, self._credit, self._usual, self._rest = 0.0, 0.0, 0.0, HOPE, 0

    @property
    def wishes(self) -> Wishes:
        """The companion that notes requests' overrides and targets."""
        return self.learner.wishes

    def ask(self, view: EngineView, hint: Ints) -> Ints:
        """[C] nodes worth drafting for each slot; all zero = the drafter is not called."""
        out = np.zeros(len(hint), np.int32)
        self._fit(len(hint))
        slots, length, fresh = self.learner.ready(view, hint)
        if not len(slots):
            return out
        if len(fresh):
            self.acceptance.reset(fresh)
            self.gain[fresh] = self._usual  # a newcomer is hoped to be like the others, or a server that is off would never be
        length = np.minimum(length, self.k)
        forced = self.learner.wishes.bound[slots] | self._dear(int(length.max()))
        on = self._earning(slots, int(length.max()))
        if forced.any():
            planned = self._replanned(view, slots, length, bool(len(fresh)))
            length, on = np.where(forced, np.maximum(planned, 1), length), np.where(forced, planned > 0, on)
        if on.all() or self._probing(view, slots, 1 if forced.any() else int(length.max())):
            out[slots] = length
        else:
            out[slots] = np.where(on, length, 0)
        return affordable(view, out)

    def select(self, view: EngineView, grants: Grants, draft: Draft) -> Keep:
        """The nodes whose verification pays, by the scan over the whole batch."""
        self._fit(view.table.capacity)
        hold = np.zeros(len(grants), np.bool_)
        requests = int(np.count_nonzero(grants.draft))
        extra = self.learner.overhead.seconds(requests, int(grants.draft.max()) if requests else 0)
        batch = self.learner.planned(view, grants, draft)
        path, visits = self.acceptance.path(grants.slot, draft), self.learner.visits
        bold = view.step % BOLD_EVERY == BOLD_EVERY - 1
        if bold and visits[min(int(grants.tokens.sum()), len(visits) - 1)] < KNOWN:
            # What the step takes without drafts is the yardstick of everything else, and nobody would measure it.
            return Keep(best_nodes(batch, draft.offset, np.zeros_like(path), self.learner.latency(view)).keep, hold)
        choice = best_nodes(batch, draft.offset, path, self.learner.latency(view), extra, visits, BOLD if bold else CURIOUS)
        self._settle(grants, draft, path, batch.whole, choice, extra)
        return Keep(choice.keep, hold)

    def observe(self, facts: Facts) -> None:
        """One finished step."""
        fading = self.learner.observe(facts)
        self.acceptance.observe(facts)
        if fading:
            self.acceptance.fade()

    def _fit(self, capacity: int) -> None:
        more = capacity - len(self.gain)
        if more > 0:
            self.learner.fit(capacity)
            self.gain = np.concatenate([self.gain, np.full(more, HOPE)])
            self.acceptance.fit(capacity)

    def _dear(self, depth: int) -> bool:
        """Drafting deep costs a sizeable part of a step, so it must be planned and not just cut afterwards."""
        return self.learner.overhead.per_level * depth > CHEAP * self._plain > 0.0

    def _earning(self, slots: Ints, depth: int) -> np.ndarray:
        """Whose drafts lately earned more than drafting for them costs."""
        overhead = self.learner.overhead
        worth = self.gain[slots] / max(self._rate, 1e-9)
        on = worth > overhead.per_request
        if worth[on].sum() <= (overhead.seconds(len(slots), depth) - overhead.seconds(0, 0)) * on.mean():
            on[:] = False
        return on

    def _probing(self, view: EngineView, slots: Ints, depth: int) -> bool:
        """Whether everybody is asked in this step: all probes fall together, so that between them the drafter is not called at all."""
        overhead = self.learner.overhead
        cost = overhead.seconds(len(slots), depth) - overhead.seconds(0, 0)
        share = cost / max(self._plain, 1e-9) / max(self.explore, 1e-9)
        every = 1 << int(np.clip(np.ceil(np.log2(max(share, 1.0))), OFTENEST, RAREST))
        return view.step % every == 0

    def _replanned(self, view: EngineView, slots: Ints, length: Ints, fresh: bool) -> Ints:
        """The plan, or zeros where plans have lately been empty: they are then made ever more rarely, until somebody new comes."""
        self._rest = 0 if fresh else self._rest
        if self._rest and view.step % self._rest:
            return np.zeros(len(slots), np.int32)
        planned = self._planned(view, slots, length)
        self._rest = 0 if planned.any() else min(2 * max(self._rest, 1), REST)
        return planned

    def _planned(self, view: EngineView, slots: Ints, length: Ints) -> Ints:
        """How far expected acceptance by position justifies to draft, 0 included: counts by the scan, then the best depth to cut all at."""
        learner, latency = self.learner, self.learner.latency(view)
        batch = learner.batch(slots, view, length)
        n, extra = len(batch.start) + 1, learner.overhead.seconds(len(slots), 1)
        at, path = learner.positions.curves(slots, length)
        choice = best_nodes(batch, padded(at, n, at[-1]), path.astype(np.float32), latency, extra, learner.visits)
        short = np.add.reduceat(choice.keep, at[:-1], dtype=np.int32)
        if not short.any():
            return short
        offset, depth = chain_depths(short)
        at, path = learner.positions.curves(slots, short)
        tokens, seconds = level_curve(batch, padded(offset, n, offset[-1]), depth, padded(at, n, at[-1]), path, latency)
        price = np.array([learner.overhead.seconds(len(slots) if k else 0, k) for k in range(len(tokens))])
        return np.minimum(short, best_level(tokens, seconds, price)).astype(np.int32)

    def _settle(self, grants: Grants, draft: Draft, path: Singles, whole: np.ndarray, choice: Choice, extra: float) -> None:
        """What asking earned each request, net of the rows it took. Then probe: verify the first node of requests we know little about
        instead of the least likely nodes chosen: no row more, so no time lost.

        What is given up, in expected tokens, stays within ``explore`` of what is emitted. Where nothing was chosen, a row is added at its price.
        """
        self._plain, self._rate = choice.plain, choice.tokens / max(choice.seconds + extra, 1e-9)
        idle = np.empty(len(grants), np.int32)
        price = self._rate * max(choice.seconds - choice.plain, 0.0)
        n, net = _earn(grants.slot, grants.draft, draft.offset, choice.keep, path, price, whole, self.gain, self.acceptance.spread, idle)
        self._usual += PATIENT * (net - self._usual)
        self._credit = min(self._credit + self.explore * choice.tokens, CREDIT)
        if not n:
            return
        last = choice.order[::-1]
        unsure = self.acceptance.spread[grants.slot[idle[:n]]].max(1)
        for i, g in enumerate(idle[:n][np.argsort(-unsure, kind="stable")][: 1 + len(last) // 16].tolist()):
            node = int(draft.offset[g])
            loss = (float(path[last[i]]) if i < len(last) else choice.row * self._rate) - float(path[node])
            if loss > self._credit:
                break
            self._credit -= max(loss, 0.0)
            choice.keep[node] = True
            choice.keep[last[i : i + 1]] = False
