"""The gap rule in two dimensions: which (tokens x layers) rectangles are legal, and how progress advances.

``computed`` tokens have all layers. Above it, ``fronts`` lists open rectangles [(token end, layers done)], ends increasing, layers
decreasing. A grant (tokens [a, b), layers [p, q)) is legal iff those tokens have exactly p layers done and all earlier tokens have at
least q.
"""

from __future__ import annotations

Fronts = list[tuple[int, int]]


def legal(computed: int, fronts: Fronts, a: int, b: int, p: int, q: int, layers: int) -> bool:
    """Whether the rectangle may be granted."""
    if not (computed <= a < b and 0 <= p < q <= layers):
        return False
    begin, have = computed, layers
    for end, done in [*fronts, (1 << 30, 0)]:
        if a < end and b > begin and done != p:
            return False
        if begin < a and done < q:
            return False
        begin, have = end, done
    return have == 0


def advance(computed: int, fronts: Fronts, a: int, b: int, q: int, layers: int) -> tuple[int, Fronts]:
    """``computed`` and ``fronts`` after tokens [a, b) reached ``q`` layers. The rectangle must have been legal."""
    pieces: Fronts = []
    begin = computed
    for end, done in [*fronts, (max(b, fronts[-1][0] if fronts else b), 0)]:
        for lo, hi, d in ((begin, min(end, a), done), (max(begin, a), min(end, b), q), (max(begin, b), end, done)):
            if lo < hi:
                pieces.append((hi, d))
        begin = end
    merged: Fronts = []
    for end, done in pieces:
        if done == 0:
            continue
        if done == layers:
            computed = end
        elif merged and merged[-1][1] == done:
            merged[-1] = (end, done)
        else:
            merged.append((end, done))
    return computed, merged
