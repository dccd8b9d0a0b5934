"""Drafts from suffix counts for a whole batch: which match to continue, and how far (SuffixDecoding, Oliaro et al., 2024, section 4).

Every suffix of the context that is stored is a match; one of m ids may draft ``floor(factor * m + offset)`` ids, each with the estimated
probability D = the product of count(string + id) / count(string) along its path. The match whose draft has the largest sum of D wins, the
longer one on equal sums, the request's own text before other responses. Matches that share a state share all counts, so one walk serves
them, from the longest on; a state that cannot beat the best sum so far (its k ids have at most its best child's D) is passed over.
Arithmetic is float32 in ArcticInference's order, so that in path mode the drafts are the same.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from presage.draft.host import take_in
from presage.draft.suffix_tree import (
    BCNT,
    BEST,
    BTOK,
    COUNT,
    DEG,
    DEPTH,
    EDGE,
    LINK,
    NEXT,
    ONE_CHILD,
    OWNER,
    TO,
    TOK,
    append_one,
    inlined,
    kernel,
    length_of,
    match,
)

# Columns of a seat. Own tree and cursor; shared tree, cursor, the response's number and how many ids of it are in; the longest match that
# had a continuation when the slot was last looked up, and how many ids it had then. 0 = no tree, no cursor.
ROOT, CURSOR, GROOT, GCURSOR, GOWNER, STORED, REACH, SEEN, SEAT = range(9)
# Columns of knobs [slots, 4] float32.
FACTOR, OFFSET, MIN_PROB, TREE, KNOBS = range(5)
# Scratch. ``ints``: four rows (ids, parents, depths, states) of the best draft, of the one being made, of its frontier.
# ``reals``: their probabilities, and running sums of the one being made.
NEW, EDGE_ROW, ROWS = 4, 8, 12
SUMS, REALS = 3, 4
WIDTH = 256
FRONTIER = 1024


@kernel
def index_many(ctl, S, E, B, data, start, prompt, done, seat, slots, upto, W):
    """Append ids [done, upto) of each slot to its own tree, and those of its response to the shared one too.

    Returns False, with what was done recorded in ``done`` and ``seat``, when the pools must grow first.
    """
    for i in range(len(slots)):
        s = slots[i]
        while done[s] < upto[i]:
            p = append_one(ctl, S, E, B, seat[s, ROOT], seat[s, CURSOR], data[start[s] + done[s]], np.int32(-1), W)
            if p < 0:
                return False
            seat[s, CURSOR] = p
            done[s] += 1
        while seat[s, GCURSOR] > 0 and prompt[s] + seat[s, STORED] < done[s]:
            t = data[start[s] + prompt[s] + seat[s, STORED]]
            p = append_one(ctl, S, E, B, seat[s, GROOT], seat[s, GCURSOR], t, np.int32(seat[s, GOWNER]), W)
            if p < 0:
                return False
            seat[s, GCURSOR] = p
            seat[s, STORED] += 1
    return True


@kernel
def advance_many(ctl, S, E, B, data, start, room, length, prompt, done, cap, seat, slots, off, ids, quota, some, upto, W):
    """Take new ids in and index them: ``take_in`` and ``index_many`` in one call. Returns 0, or what ``take_in`` said if work is left."""
    n = take_in(data, start, room, length, prompt, done, cap, slots, off, ids, quota, 0, some, upto)
    if n > 0 and index_many(ctl, S, E, B, data, start, prompt, done, seat, some[:n], upto[:n], W):
        return 0
    return n


@kernel
def append_many(ctl, S, E, B, root, ids, off, cursor, done, owner, W):
    """Append sequences ``ids[off[i]:off[i+1]]`` at ``cursor[i]``; ``done[i]`` ids of each are in already. False: the pools must grow."""
    for i in range(len(cursor)):
        while off[i] + done[i] < off[i + 1]:
            p = append_one(ctl, S, E, B, root, cursor[i], ids[off[i] + done[i]], owner[i], W)
            if p < 0:
                return False
            cursor[i] = p
            done[i] += 1
    return True


@inlined
def allowed(m, factor, offset, cap):
    """Ids that a match of ``m`` may draft."""
    k = np.int64(np.float64(np.float32(m) * factor + offset) + 1e-6)
    return max(0, min(k, cap))


@kernel
def _chain(S, E, v, k, floor, ints, reals):
    """Follow the most frequent children for up to ``k`` ids; ``reals[SUMS, n]`` is the sum of the first n probabilities. Returns how many."""
    n, sure, total = 0, np.float32(1), np.float32(0)
    reals[SUMS, 0] = 0
    while n < k and S[v, DEG] >= ONE_CHILD:
        sure *= np.float32(S[v, BCNT]) / np.float32(S[v, COUNT])
        if sure < floor:
            break
        total += sure
        ints[NEW, n], ints[NEW + 3, n], reals[1, n], reals[SUMS, n + 1] = S[v, BTOK], S[v, BEST], sure, total
        n += 1
        v = S[v, BEST]
    return n


@inlined
def promising(S, E, v, k, best):
    """Whether k ids after state ``v``, none likelier than its best child, could reach a sum of more than ``best``."""
    if S[v, DEG] < ONE_CHILD:
        return False
    # A little slack: sums of float32 may exceed the product by rounding.
    return k * np.float32(S[v, BCNT]) > best * np.float32(0.99999) * np.float32(S[v, COUNT])


@kernel
def best_chain(ctl, S, E, root, v, longest, knob, cap, best, ints, reals):
    """The best chain over all matches of up to ``longest`` ids from state ``v`` on, if its sum beats ``best``: (sum, match, ids)."""
    depth, found, nodes = ctl[DEPTH], 0, 0
    factor, offset, floor = knob[FACTOR], knob[OFFSET], knob[MIN_PROB]
    while v != root:
        high, low = min(length_of(S, v), longest), length_of(S, S[v, LINK]) + 1
        k = allowed(high, factor, offset, cap)
        if high >= low and promising(S, E, v, k, best):
            got = _chain(S, E, v, min(k, depth - low), floor, ints, reals)
            better = 0
            for m in range(high, low - 1, -1):
                n = min(min(allowed(m, factor, offset, cap), depth - m), got)
                if reals[SUMS, n] > best:
                    best, found, better = reals[SUMS, n], m, n
                if n == got:
                    break
            if better:
                nodes = better
                for j in range(nodes):
                    ints[0, j], ints[1, j], ints[2, j], ints[3, j], reals[0, j] = ints[NEW, j], j - 1, j + 1, ints[NEW + 3, j], reals[1, j]
        v = S[v, LINK]
    return best, found, nodes


@kernel
def _put(ints, reals, n, t, u, parent, level, p):
    ints[EDGE_ROW, n], ints[EDGE_ROW + 1, n], ints[EDGE_ROW + 2, n], ints[EDGE_ROW + 3, n], reals[2, n] = t, parent, level, u, p
    return n + 1


@kernel
def _offer(S, E, v, sure, parent, level, floor, ints, reals, size):
    """Put the children of a node whose D reaches the floor on the frontier; returns its new size. D sums to at most 1 there."""
    total = np.float32(S[v, COUNT])
    if S[v, DEG] < 2 * ONE_CHILD:
        if S[v, DEG] >= ONE_CHILD:
            p = sure if S[v, BCNT] == S[v, COUNT] else sure * np.float32(S[v, BCNT]) / total
            if p >= floor:
                size = _put(ints, reals, size, S[v, BTOK], S[v, BEST], parent, level, p)
        return size
    e = S[v, EDGE]
    while e >= 0:
        p = sure * np.float32(S[E[e, TO], COUNT]) / total
        if p < floor:
            break
        size = _put(ints, reals, size, E[e, TOK], E[e, TO], parent, level, p)
        e = E[e, NEXT]
    return size


@kernel
def _pick(S, ints, reals, size, top):
    """Index of the likeliest frontier node; on equal D the earliest parent, then its most frequent child, then the smallest id."""
    b = 0
    for j in range(1, size):
        if reals[2, j] != reals[2, b]:
            if reals[2, j] > reals[2, b]:
                b = j
            continue
        up, over = ints[EDGE_ROW + 1, j], ints[EDGE_ROW + 1, b]
        if up != over:
            if up < over:
                b = j
            continue
        first = S[top if up < 0 else ints[NEW + 3, up], BEST]
        if ints[EDGE_ROW + 3, j] == first or (ints[EDGE_ROW + 3, b] != first and ints[EDGE_ROW, j] < ints[EDGE_ROW, b]):
            b = j
    return b


@kernel
def _grow_tree(S, E, v, k, deepest, floor, ints, reals):
    """Best-first tree of up to ``k`` nodes under ``v``: (nodes, sum of D)."""
    n, total = 0, np.float32(0)
    size = _offer(S, E, v, np.float32(1), -1, 1, floor, ints, reals, 0) if deepest > 0 else 0
    while n < k and size > 0:
        b = _pick(S, ints, reals, size, v)
        sure, state, level = reals[2, b], ints[EDGE_ROW + 3, b], ints[EDGE_ROW + 2, b]
        size -= 1
        for r in range(4):
            ints[NEW + r, n] = ints[EDGE_ROW + r, b]
            ints[EDGE_ROW + r, b] = ints[EDGE_ROW + r, size]
        reals[1, n], reals[2, b] = sure, reals[2, size]
        total += sure
        if level < deepest:
            size = _offer(S, E, state, sure, n, level + 1, floor, ints, reals, size)
        n += 1
    return n, total


@kernel
def _keep_tree(n, ints, reals):
    """The tree just made becomes the best one."""
    for r in range(4):
        for j in range(n):
            ints[r, j] = ints[NEW + r, j]
    for j in range(n):
        reals[0, j] = reals[1, j]


@kernel
def best_tree(ctl, S, E, root, v, longest, knob, cap, best, ints, reals):
    """As ``best_chain``, with trees.

    Of a state's matches the longest that its depth does not cut comes first: shorter ones only draft less, and longer ones, though they win
    ties, are cut to fewer levels, whose D sum to at most 1 each.
    """
    depth, found, nodes = ctl[DEPTH], 0, 0
    factor, offset, floor = knob[FACTOR], knob[OFFSET], max(knob[MIN_PROB], np.float32(1 / FRONTIER))
    while v != root:
        m, high, low, here = min(length_of(S, v), longest), min(length_of(S, v), longest), length_of(S, S[v, LINK]) + 1, False
        while m > low and depth - m < allowed(m, factor, offset, cap):
            m -= 1
        while low <= m <= high and (depth - m) * np.float32(1.0001) >= best:
            k = allowed(m, factor, offset, cap)
            if promising(S, E, v, k, best):
                n, total = _grow_tree(S, E, v, k, depth - m, floor, ints, reals)
                if total > best or (here and total == best):
                    best, found, nodes, here = total, m, n, True
                    _keep_tree(n, ints, reals)
            m += 1
        v = S[v, LINK]
    return best, found, nodes


@kernel
def _search(ctl, S, E, root, v, longest, knob, cap, best, ints, reals):
    """The better of ``best`` and what one tree offers, and the longest match that was ever continued there."""
    reach, w = 0, v
    while w != root and S[w, DEG] < ONE_CHILD:
        w = S[w, LINK]
    if w != root:
        reach = min(length_of(S, w), longest)
    if knob[TREE] > 0:
        best, found, n = best_tree(ctl, S, E, root, w, longest, knob, cap, best, ints, reals)
    else:
        best, found, n = best_chain(ctl, S, E, root, w, longest, knob, cap, best, ints, reals)
    return best, found, n, reach


@kernel
def _speculate(ctl, S, E, B, data, end, known, seat, knob, cap, ints, reals):
    """Draft for one slot into the best rows: (ids, match length, tree, sum of D). Own text first: the shared tree must beat it."""
    longest = min(known, ctl[DEPTH]) - 1
    best, found, n, reach = _search(ctl, S, E, seat[ROOT], seat[CURSOR], longest, knob, cap, np.float32(0), ints, reals)
    tree = 1 if n else 0
    groot = seat[GROOT]
    if groot > 0:
        # The cursor knows the matches within the response; others may reach back into the prompt.
        v, far = seat[GCURSOR], longest
        if v <= 0 or seat[STORED] < longest:
            v, far = match(ctl, S, E, B, groot, data, end - longest, end)
        score, m, more, further = _search(ctl, S, E, groot, v, far, knob, cap, best, ints, reals)
        reach = max(reach, further)
        if more:
            best, found, tree, n = score, m, 2, more
    seat[REACH], seat[SEEN] = reach, known
    return n, found, tree, best


@kernel
def speculate_many(ctl, S, E, B, data, start, length, done, seat, knobs, last, slots, budget, ints, reals, offset, nodes, prob, info):
    """Drafts for all slots in one call. ``nodes`` [3 N]: ids, parents, depths; ``info`` [G, 3]: match length, 1 own / 2 shared tree, sum of D.

    ``last`` [slots, 3, cap] keeps ids, parents and writers (-1: own tree) for ``judge_many``. No draft while ids wait to be indexed.
    """
    at, offset[0], room = 0, 0, len(prob)
    for i in range(len(slots)):
        s, n, found, tree, best = slots[i], 0, 0, 0, np.float32(0)
        cap = min(budget[i], last.shape[2])
        if cap > 0 and done[s] > 1 and done[s] == length[s]:
            n, found, tree, best = _speculate(ctl, S, E, B, data, start[s] + done[s], done[s], seat[s], knobs[s], cap, ints, reals)
        for j in range(n):
            nodes[at + j], nodes[room + at + j], nodes[2 * room + at + j], prob[at + j] = ints[0, j], ints[1, j], ints[2, j], reals[0, j]
            last[s, 0, j], last[s, 1, j], last[s, 2, j] = ints[0, j], ints[1, j], S[ints[3, j], OWNER] if tree == 2 else -1
        if n < last.shape[2]:
            last[s, 1, n] = -2
        at += n
        offset[i + 1] = at
        info[i, 0], info[i, 1], info[i, 2] = found, tree, best
    return at


@kernel
def judge_many(last, slots, off, ids, out):
    """Into ``out`` [G]: the writers of the deepest node of each slot's last draft that the new ids confirm, -1 if none or its own.

    The drafts are forgotten.
    """
    for i in range(len(slots)):
        s, at, j = slots[i], off[i], 0
        node, out[i] = -1, -1
        while j < last.shape[2] and last[s, 1, j] > -2 and at < off[i + 1]:
            if last[s, 1, j] == node and last[s, 0, j] == ids[at]:
                out[i], node, at = last[s, 2, j], j, at + 1
            j += 1
        last[s, 1, 0] = -2
