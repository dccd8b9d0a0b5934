"""What the logits would have said: the ids a simulated request goes on with, and which of its drafts come true.

Ids come from the trace (``Request.extras["reply"]``, or ``["replies"]`` by branch) or from a rule: id(position) = base + position, ``base``
a hash of the request's name. So equal prefixes stay equal, unequal ones differ from their first block on, and stops, prefix hits and drafts
behave as they would.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np
from numba import njit

from presage.core.plan import StepPlan, Verdict
from presage.core.protocols import Companion
from presage.core.request import Request
from presage.core.types import Ints, Want

_SAMPLE = int(Want.SAMPLE)
_MASK = 0x3FFFFFFF


class Oracle(Protocol):
    """Answers a plan as the head and the acceptance rule would. It is a companion of the loop, so it knows who sits in which slot."""

    def judge(self, plan: StepPlan) -> Verdict:
        """Accepted draft nodes and decided ids of every span."""


def synthetic_base(name: str) -> int:
    """Where a request's synthetic ids begin; far from the special ids of any vocabulary."""
    return zlib.crc32(name.encode()) & _MASK


def synthetic_ids(base: int, start: int, stop: int) -> Ints:
    """Ids of positions [start, stop) of a text that only its length is known of."""
    return np.asarray((np.arange(start, stop, dtype=np.int64) + base & _MASK) + 1024, np.int32)


@njit(cache=True)
def told(base, position):  # type: ignore[no-untyped-def]
    """The rule: the id at a position of a text; wrapped so that it never reaches the special ids below 1024."""
    return np.int32((base + position & _MASK) + 1024)


@njit(cache=True)
def _tell(slot, start, count, want, base, off, ids):  # type: ignore[no-untyped-def]
    """One id per sampling span, by the rule."""
    n = 0
    off[0] = 0
    for s in range(len(slot)):
        if want[s] & _SAMPLE:
            ids[n] = told(base[slot[s]], start[s] + count[s])
            n += 1
        off[s + 1] = n
    return n


@njit(cache=True)
def _walk(offset, token, parent, nodes, sampling, truth_off, truth, path_off, path, off, ids):  # type: ignore[no-untyped-def]
    """Longest path of each span's tree that equals the truth, and the ids it decides; returns (accepted, decided)."""
    accepted, decided = 0, 0
    path_off[0] = off[0] = 0
    for s in range(len(nodes)):
        if sampling[s]:
            node, k = -1, 0
            while True:
                want = truth[truth_off[s] + k]
                ids[decided] = want
                decided += 1
                k += 1
                found = -1
                for j in range(nodes[s]):
                    if parent[offset[s] + j] == node and token[offset[s] + j] == want:
                        found = j
                        break
                if found < 0:
                    break
                path[accepted] = found
                accepted += 1
                node = found
        path_off[s + 1], off[s + 1] = accepted, decided
    return accepted, decided


class TraceOracle(Companion):
    """Recorded replies where the request has one, the rule elsewhere. After a reply's end come ``eos`` ids (the rule's, if there is none)."""

    def __init__(self, eos: int | None = None) -> None:
        self.eos = eos
        self.base = np.zeros(64, np.int64)
        self.replies: dict[int, tuple[int, Ints]] = {}

    def judge(self, plan: StepPlan) -> Verdict:
        """Drafts are accepted while they equal the truth (the ``keyed`` and greedy rules)."""
        n = len(plan.slot)
        off = np.empty(n + 1, np.int32)
        if len(plan.draft):
            return self._judge_drafts(plan, off)
        ids = np.empty(n, np.int32)
        total = _tell(plan.slot, plan.start, plan.count, plan.want, self.base, off, ids)
        if self.replies:
            for s, slot in enumerate(plan.slot.tolist()):
                if slot in self.replies and plan.want[s] & _SAMPLE:
                    ids[off[s]] = self.ids(slot, p := int(plan.start[s] + plan.count[s]), p + 1)[0]
        none = np.empty(0, np.int32)
        return Verdict(none, none, off, ids[:total])

    def _judge_drafts(self, plan: StepPlan, off: Ints) -> Verdict:
        d, n = plan.draft, len(plan.slot)
        at = (plan.start + plan.count).tolist()
        truth = [self.ids(s, a, a + k + 1) for s, a, k in zip(plan.slot.tolist(), at, plan.nodes.tolist())]
        truth_off = np.concatenate([[0], np.cumsum(plan.nodes + 1)]).astype(np.int32)
        path_off, path, ids = np.empty(n + 1, np.int32), np.empty(len(d), np.int32), np.empty(len(d) + n, np.int32)
        sampling = (plan.want & _SAMPLE) > 0
        got, new = _walk(d.offset, d.token, d.parent, plan.nodes, sampling, truth_off, np.concatenate(truth), path_off, path, off, ids)
        return Verdict(path_off, path[:got], off, ids[:new])

    def ids(self, slot: int, a: int, b: int) -> Ints:
        """The ids the slot's text will have at positions [a, b)."""
        said = self.replies.get(slot)
        if said is None:
            return synthetic_ids(int(self.base[slot]), a, b)
        begin, reply = said
        known = reply[max(0, a - begin) : max(0, b - begin)]
        rest = b - a - len(known)
        tail = synthetic_ids(int(self.base[slot]), b - rest, b) if self.eos is None else np.full(rest, self.eos, np.int32)
        return np.concatenate([known, tail]).astype(np.int32)

    # ---- the companion half

    def open(self, slot: int, req: Request) -> None:
        """Remember what the request will say."""
        if slot >= len(self.base):
            self.base = np.concatenate([self.base, np.zeros(max(slot + 1, len(self.base)), np.int64)])
        self.base[slot] = synthetic_base(req.id) + 7919 * req.branch
        reply = req.extras.get("replies", {}).get(req.branch, req.extras.get("reply"))
        if reply is not None:
            self.replies[slot] = (len(req.prompt), np.asarray(reply, np.int32))

    def close(self, slot: int) -> None:
        """Forget the slot."""
        self.replies.pop(slot, None)


@njit(cache=True)
def _uniform(key, position):  # type: ignore[no-untyped-def]
    """Noise in [0, 1) keyed by (key, position): SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    z = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(position)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)
def _draw(slot, at, base, seed, offset, token, parent, prob, nodes, sampling, path_off, path, off, ids):  # type: ignore[no-untyped-def]
    """Accept a child with P(child | parent) = prob[child] / prob[parent]; what follows the path is the rule's id."""
    accepted, decided = 0, 0
    path_off[0] = off[0] = 0
    for s in range(len(nodes)):
        if sampling[s]:
            node, p, reach = -1, at[s], 1.0
            while True:
                u, mass, found = _uniform(base[slot[s]] + seed, p), 0.0, -1
                for j in range(nodes[s]):
                    if parent[offset[s] + j] == node:
                        mass += prob[offset[s] + j] / reach
                        if u < mass:
                            found = j
                            break
                if found < 0:
                    ids[decided] = told(base[slot[s]], p)
                    decided += 1
                    break
                path[accepted] = found
                accepted += 1
                ids[decided] = token[offset[s] + found]
                decided += 1
                node, reach, p = found, max(1e-9, prob[offset[s] + found]), p + 1
        path_off[s + 1], off[s + 1] = accepted, decided
    return accepted, decided


class LawOracle(TraceOracle):
    """Drafts come true with the probability their drafter gives them (or ``rate`` per token): for traces without contents."""

    def __init__(self, rate: float | None = None, seed: int = 0, eos: int | None = None) -> None:
        super().__init__(eos)
        self.rate, self.seed = rate, seed

    def _judge_drafts(self, plan: StepPlan, off: Ints) -> Verdict:
        d, n = plan.draft, len(plan.slot)
        prob = d.prob if self.rate is None else (self.rate**d.depth).astype(np.float32)
        path_off, path, ids = np.empty(n + 1, np.int32), np.empty(len(d), np.int32), np.empty(len(d) + n, np.int32)
        sampling, at = (plan.want & _SAMPLE) > 0, plan.start + plan.count
        got, new = _draw(
            plan.slot, at, self.base, self.seed, d.offset, d.token, d.parent, prob, plan.nodes, sampling, path_off, path, off, ids
        )  # fmt: skip
        return Verdict(path_off, path[:got], off, ids[:new])
