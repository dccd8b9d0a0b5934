"""SuffixDecoding's speculation in plain Python over brute-force counts, written from the paper: what the kernels are compared with."""

from __future__ import annotations

import math

import numpy as np

f32 = np.float32


class Reference:
    """One tree: all its sequences as lists, in the order their ids came (``log``)."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.sequences: dict[int, list[int]] = {}
        self.order: dict[tuple[int, ...], list[int]] = {}
        self.counts: dict[tuple[int, ...], int] = {}

    def append(self, number: int, token: int) -> None:
        s = self.sequences.setdefault(number, [])
        s.append(token)
        for size in range(1, min(len(s), self.depth) + 1):
            self._count(tuple(s[-size:]))

    def _count(self, string: tuple[int, ...]) -> None:
        """One more occurrence; the children of a string are kept by count, equal ones in the order of the official code."""
        c = self.counts[string] = self.counts.get(string, 0) + 1
        parent, token = string[:-1], string[-1]
        row = self.order.setdefault(parent, [])
        count = {t: self.counts[(*parent, t)] for t in row}
        if c == 1:
            row.append(token)
            return
        first = next(t for t in row if t == token or count[t] == c - 1) == token
        row.remove(token)
        place = [i for i, t in enumerate(row) if (count[t] <= c if first else count[t] < c)]
        row.insert(place[0] if place else len(row), token)

    def children(self, string: tuple[int, ...]) -> list[tuple[int, int]]:
        if len(string) >= self.depth:
            return []
        return [(t, self.counts[(*string, t)]) for t in self.order.get(string, [])]

    def speculate(self, context: list[int], cap: int, factor: float, offset: float, floor: float, tree: bool) -> tuple[list, float, int]:
        """Nodes (id, parent, probability), their sum, and the match length."""
        best: tuple[list, float, int] = ([], f32(0), 0)
        context = context[-self.depth :]
        for m in range(1, len(context)):
            match = tuple(context[-m:])
            if match not in self.counts:
                break
            k = max(0, min(cap, math.floor(float(f32(m) * f32(factor) + f32(offset)) + 1e-6)))
            nodes = (self._tree if tree else self._path)(match, k, f32(floor))
            score = f32(0)
            for _, _, p in nodes:
                score += p
            if score >= best[1]:
                best = (nodes, score, m)
        return best

    def _path(self, string: tuple[int, ...], k: int, floor: np.float32) -> list[tuple[int, int, np.float32]]:
        out: list[tuple[int, int, np.float32]] = []
        sure = f32(1)
        while len(out) < k and self.children(string):
            token, count = self.children(string)[0]
            sure = sure * (f32(count) / f32(self.counts[string]))
            if sure < floor:
                break
            out.append((token, len(out) - 1, sure))
            string = (*string, token)
        return out

    def _tree(self, string: tuple[int, ...], k: int, floor: np.float32) -> list[tuple[int, int, np.float32]]:
        """Best first; equal probabilities: earliest parent, then its first child, then the smallest id."""
        out: list[tuple[int, int, np.float32]] = []
        frontier: list[tuple[np.float32, int, bool, int, tuple[int, ...]]] = []

        def offer(s: tuple[int, ...], sure: np.float32, parent: int) -> None:
            for i, (token, count) in enumerate(self.children(s)):
                p = sure if count == self.counts[s] else sure * f32(count) / f32(self.counts[s])
                if p >= floor:
                    frontier.append((-p, parent, i > 0, token, (*s, token)))

        offer(string, f32(1), -1)
        while frontier and len(out) < k:
            frontier.sort(key=lambda item: item[:4])
            p, parent, _, token, s = frontier.pop(0)
            out.append((token, parent, -p))
            offer(s, -p, len(out) - 1)
        return out
