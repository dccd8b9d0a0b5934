"""Counts of all strings up to ``depth`` ids in many token sequences: a depth-limited suffix automaton, grown and shrunk id by id.

SuffixDecoding (Oliaro et al., 2024) keeps these counts in a suffix tree and touches one tree position per suffix and id. Here all strings
that end at the same places share one **state**, so an id touches one state per distinct count: a handful, however long the repetition.
A state is eight int32 (half a cache line) and needs no text: longest string and number of children, suffix link (the state of the longest
string that ends elsewhere too), count, its most frequent child with id and count, list of children, last writer. A single child lives in
the state itself; others are **edges** (eight int32) in a chained hash and in a list per state, by count, largest first. Children of equal
count are a **run**, whose record knows its first edge, so that a count rises in constant time; among equals the order is ArcticInference's
(the first of a run joins the next run in front, any other behind). ``child(v, t)`` is exact for the strings of ``v`` shorter than
``depth``. A root is the state of the empty string (its children are not ordered); any number of roots share the pools.

Removal takes back what an insertion counted. States and edges whose count falls to zero return to the pools; states that could be merged
again are not: counts stay exact, and the drafter rebuilds when there are too many. Insertions are Blumer et al.'s (1985) with states cut at
``depth`` and counts kept online. Every function here is a numba kernel; ``ctl`` [CTL] int64 holds what changes, ``S`` [states, 8],
``E`` [edges, 8] and ``B`` [buckets] int32 the pools. A *cursor* is the state of the last min(depth, n) ids of a sequence.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Columns of S. DEG holds len | children << 8, so both come with one load.
DEG, LINK, COUNT, BEST, BTOK, BCNT, EDGE, OWNER = range(8)
# Columns of E. PREV of the first edge is the last one. HEAD belongs to the run record of that number, not to the edge.
FROM, TOK, TO, NEXT, PREV, CHAIN, RUN, HEAD = range(8)
# Entries of ctl: first never used state, first free one, live states; the same for edges; first unused and free run; hash mask; depth.
STOP, SFREE, STATES, ETOP, EFREE, EDGES, RTOP, RFREE, MASK, DEPTH, CTL = range(11)
ONE_CHILD = 256
SCRATCH = 2 * 256
# Without the runtime's reference counts, whose atomic increments took a quarter of an insertion: kernels cannot allocate, callers bring scratch.
_LEAN: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}
kernel = njit(**_LEAN)
inlined = njit(**_LEAN, inline="always")


@inlined
def length_of(S, v):
    """Length of the longest string of a state."""
    return S[v, DEG] & 255


@inlined
def bucket_of(ctl, v, t):
    """Hash bucket of (state, id)."""
    h = np.uint64(v) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(t) * np.uint64(0xC2B2AE3D27D4EB4F)
    return np.int64((h >> np.uint64(29)) & np.uint64(ctl[MASK]))


@kernel
def find_edge(ctl, E, B, v, t):
    """Edge of a state with two children or more, -1 if it has none for ``t``."""
    e = B[bucket_of(ctl, v, t)]
    while e >= 0 and (E[e, FROM] != v or E[e, TOK] != t):
        e = E[e, CHAIN]
    return e


@inlined
def child(ctl, S, E, B, v, t):
    """State of the strings of ``v`` (shorter than depth) followed by ``t``, or -1."""
    if S[v, BTOK] == t:
        return S[v, BEST]
    if S[v, DEG] < 2 * ONE_CHILD:
        return np.int32(-1)
    e = find_edge(ctl, E, B, v, t)
    return E[e, TO] if e >= 0 else np.int32(-1)


@kernel
def new_state(ctl, S, length, link, owner):
    """A childless state with count 0. The caller made sure that there is room."""
    v = ctl[SFREE]
    if v >= 0:
        ctl[SFREE] = S[v, EDGE]
    else:
        v = ctl[STOP]
        ctl[STOP] += 1
    ctl[STATES] += 1
    S[v, DEG], S[v, LINK], S[v, COUNT], S[v, OWNER] = length, link, 0, owner
    S[v, BEST], S[v, BTOK], S[v, BCNT], S[v, EDGE] = -1, -1, 0, -1
    return v


@kernel
def free_state(ctl, S, v):
    """Return a state that nothing refers to."""
    S[v, EDGE], S[v, COUNT], S[v, OWNER] = ctl[SFREE], -1, -1
    ctl[SFREE] = v
    ctl[STATES] -= 1


@kernel
def _new_run(ctl, E, e):
    r = ctl[RFREE]
    if r >= 0:
        ctl[RFREE] = E[r, HEAD]
    else:
        r = ctl[RTOP]
        ctl[RTOP] += 1
    E[r, HEAD] = e
    E[e, RUN] = r


@kernel
def _leave_run(ctl, E, e):
    """An edge leaves its run before it moves in its list."""
    r, after = E[e, RUN], E[e, NEXT]
    if E[r, HEAD] == e:
        if after >= 0 and E[after, RUN] == r:
            E[r, HEAD] = after
        else:
            E[r, HEAD] = ctl[RFREE]
            ctl[RFREE] = r


@kernel
def _unlist(S, E, v, e):
    before, after, head = E[e, PREV], E[e, NEXT], S[v, EDGE]
    if head == e:
        S[v, EDGE] = head = after
    else:
        E[before, NEXT] = after
    if after >= 0:
        E[after, PREV] = before
    elif head >= 0:
        E[head, PREV] = before


@kernel
def _list_before(S, E, v, e, f):
    """Put a free edge in front of ``f``."""
    before = E[f, PREV]
    E[e, NEXT], E[e, PREV], E[f, PREV] = f, before, e
    if S[v, EDGE] == f:
        S[v, EDGE] = e
    else:
        E[before, NEXT] = e


@kernel
def _list_after(S, E, v, e, f):
    """Put a free edge behind ``f``."""
    after = E[f, NEXT]
    E[e, NEXT], E[e, PREV], E[f, NEXT] = after, f, e
    E[after if after >= 0 else S[v, EDGE], PREV] = e


@kernel
def _push_edge(ctl, S, E, B, v, t, u, count):
    """A new edge at the end of the list; no edge there has a smaller count. The child being added has 0 until it is counted: take 1."""
    e = ctl[EFREE]
    if e >= 0:
        ctl[EFREE] = E[e, NEXT]
    else:
        e = ctl[ETOP]
        ctl[ETOP] += 1
    ctl[EDGES] += 1
    b = bucket_of(ctl, v, t)
    E[e, FROM], E[e, TOK], E[e, TO], E[e, CHAIN] = v, t, u, B[b]
    B[b] = e
    head = S[v, EDGE]
    if head < 0:
        S[v, EDGE], E[e, PREV], E[e, NEXT] = e, e, -1
        _new_run(ctl, E, e)
        return
    last = E[head, PREV]
    _list_after(S, E, v, e, last)
    if max(1, S[E[last, TO], COUNT]) == count:
        E[e, RUN] = E[last, RUN]
    else:
        _new_run(ctl, E, e)


@kernel
def _drop_edge(ctl, S, E, B, v, t):
    b = bucket_of(ctl, v, t)
    e, last = B[b], -1
    while E[e, FROM] != v or E[e, TOK] != t:
        last, e = e, E[e, CHAIN]
    if last >= 0:
        E[last, CHAIN] = E[e, CHAIN]
    else:
        B[b] = E[e, CHAIN]
    _leave_run(ctl, E, e)
    _unlist(S, E, v, e)
    E[e, NEXT], E[e, FROM] = ctl[EFREE], -1
    ctl[EFREE] = e
    ctl[EDGES] -= 1


@kernel
def _add_child(ctl, S, E, B, v, t, u):
    """A child that is about to get count 1; ``v`` has none for ``t``."""
    if S[v, DEG] < ONE_CHILD:
        S[v, BEST], S[v, BTOK], S[v, BCNT] = u, t, 0
    else:
        if S[v, DEG] < 2 * ONE_CHILD:
            _push_edge(ctl, S, E, B, v, S[v, BTOK], S[v, BEST], S[v, BCNT])
        _push_edge(ctl, S, E, B, v, t, u, 1)
    S[v, DEG] += ONE_CHILD


@kernel
def _first_child(S, E, v):
    """Copy the first edge into the state."""
    e = S[v, EDGE]
    S[v, BEST], S[v, BTOK], S[v, BCNT] = E[e, TO], E[e, TOK], S[E[e, TO], COUNT]


@kernel
def _raise(ctl, S, E, v, e, c):
    """Move the edge of a child whose count just became ``c``, more than 1."""
    first = S[v, EDGE]
    if e == first:
        after = E[first, NEXT]
        if E[after, RUN] == E[first, RUN]:
            _leave_run(ctl, E, first)
            _new_run(ctl, E, first)
        return
    head = E[E[e, RUN], HEAD]
    before = E[head, PREV]
    joins = head != first and S[E[before, TO], COUNT] == c
    _leave_run(ctl, E, e)
    if e != head:
        _unlist(S, E, v, e)
        _list_before(S, E, v, e, head)
        if joins:
            E[e, RUN] = E[before, RUN]
        else:
            _new_run(ctl, E, e)
    elif joins:
        r = E[before, RUN]
        _unlist(S, E, v, e)
        _list_before(S, E, v, e, E[r, HEAD])
        E[e, RUN], E[r, HEAD] = r, e
    else:
        _new_run(ctl, E, e)
    if S[v, EDGE] == e:
        _first_child(S, E, v)


@kernel
def _lower(ctl, S, E, v, e, c):
    """Move the edge of a child whose count just fell to ``c``, at least 1."""
    r, last = E[e, RUN], e
    while E[last, NEXT] >= 0 and E[E[last, NEXT], RUN] == r:
        last = E[last, NEXT]
    _leave_run(ctl, E, e)
    if last != e:
        _unlist(S, E, v, e)
        _list_after(S, E, v, e, last)
    after = E[e, NEXT]
    if after >= 0 and S[E[after, TO], COUNT] == c:
        E[e, RUN], E[E[after, RUN], HEAD] = E[after, RUN], e
    else:
        _new_run(ctl, E, e)
    _first_child(S, E, v)


@kernel
def _drop_child(ctl, S, E, B, v, t):
    """Remove the child for ``t``; the last one left moves from its edge into the state."""
    S[v, DEG] -= ONE_CHILD
    if S[v, DEG] < ONE_CHILD:
        S[v, BEST], S[v, BTOK], S[v, BCNT] = -1, -1, 0
        return
    _drop_edge(ctl, S, E, B, v, t)
    _first_child(S, E, v)
    if S[v, DEG] < 2 * ONE_CHILD:
        _drop_edge(ctl, S, E, B, v, S[v, BTOK])


@kernel
def _childless(ctl, S, E, B, v):
    """Forget the children of a state, not their counts."""
    while S[v, EDGE] >= 0:
        _drop_edge(ctl, S, E, B, v, E[S[v, EDGE], TOK])
    S[v, DEG] &= 255
    S[v, BEST], S[v, BTOK], S[v, BCNT] = -1, -1, 0


@kernel
def _gather(ctl, S, E, B, root, v, t, W):
    """Rows of ``W``: the states before ``t`` from ``v`` to the root, their children for it (-1: none) and edges (-1: in the state itself).

    All look-ups come before any use, so that their cache misses overlap. Returns how many states and how many first ones lack the child.
    """
    n, missing = 0, 0
    while v >= 0:
        e, u = np.int64(-1), np.int64(-1)
        if S[v, BTOK] == t and v != root:
            u = np.int64(S[v, BEST])
            if S[v, DEG] >= 2 * ONE_CHILD:
                e = np.int64(S[v, EDGE])
        elif S[v, DEG] >= 2 * ONE_CHILD:
            e = np.int64(find_edge(ctl, E, B, v, t))
            if e >= 0:
                u = np.int64(E[e, TO])
        elif S[v, BTOK] == t:
            u = np.int64(S[v, BEST])
        W[0, n], W[1, n], W[2, n] = v, u, e
        n += 1
        missing += int(u < 0)
        v = S[v, LINK]
    return n, missing


@kernel
def _split(ctl, S, E, B, t, first, n, size, W):
    """Strings of the child of ``W[0, first]`` up to ``size`` ids get a state of their own: they are about to end where longer ones do not.

    ``W`` is kept true, also where the state that is split is itself one of those before ``t``. Returns the new length of its rows.
    """
    q = W[1, first]
    c = new_state(ctl, S, size, S[q, LINK], S[q, OWNER])
    S[c, DEG] = size | (S[q, DEG] & ~255)
    S[c, COUNT], S[c, BEST], S[c, BTOK], S[c, BCNT] = S[q, COUNT], S[q, BEST], S[q, BTOK], S[q, BCNT]
    e = S[q, EDGE]
    while e >= 0:
        _push_edge(ctl, S, E, B, c, E[e, TOK], E[e, TO], max(1, S[E[e, TO], COUNT]))
        e = E[e, NEXT]
    S[q, LINK] = c
    if size == ctl[DEPTH] - 1:
        # What is left in q is too long to be followed by anything.
        _childless(ctl, S, E, B, q)
    for j in range(n):
        v = W[0, j]
        if W[1, j] == q:
            W[1, j] = c
            if S[v, BTOK] == t:
                S[v, BEST] = c
            if W[2, j] >= 0:
                E[W[2, j], TO] = c
    for j in range(n):
        if W[0, j] == q:
            return _insert(ctl, S, E, B, t, j, n, q, c, W)
    return n


@kernel
def _insert(ctl, S, E, B, t, j, n, q, c, W):
    """State ``q`` in column ``j`` was split: its shorter strings ``c`` come next, or instead of it if nothing may follow q any more."""
    at = j if S[q, DEG] < ONE_CHILD else j + 1
    if at > j:
        for i in range(n, at, -1):
            W[0, i], W[1, i], W[2, i] = W[0, i - 1], W[1, i - 1], W[2, i - 1]
        n += 1
    if S[c, BTOK] == t and W[1, j] >= 0:
        S[c, BEST] = W[1, j]
    W[0, at], W[1, at] = c, W[1, j]
    W[2, at] = find_edge(ctl, E, B, c, t) if S[c, DEG] >= 2 * ONE_CHILD else -1
    if W[2, at] >= 0:
        E[W[2, at], TO] = W[1, j]
    return n


@kernel
def _count(ctl, S, E, root, n, owner, W):
    """One more occurrence of every string that ends here: each state after the id is the child of one or more before it."""
    last = np.int64(-1)
    for j in range(n):
        v, u = W[0, j], W[1, j]
        if u != last:
            S[u, COUNT] += 1
            S[u, OWNER] = owner
            last = u
        if v != root:
            c = S[u, COUNT]
            if c > 1 and W[2, j] >= 0:
                _raise(ctl, S, E, v, W[2, j], c)
            if S[v, BEST] == u:
                S[v, BCNT] = c


@inlined
def short_of(S, p, depth):
    """The state of the cursor's strings that are shorter than depth: those may grow by one id."""
    if length_of(S, p) == depth:
        link = S[p, LINK]
        if length_of(S, link) == depth - 1:
            return np.int64(link)
    return np.int64(p)


@kernel
def append_one(ctl, S, E, B, root, p, t, owner, W):
    """Append id ``t`` to the sequence with cursor ``p``; returns the new cursor, or -1 with no effect if the pools have no room.

    ``W`` [3, 2 * 256] int64 is scratch.
    """
    depth = ctl[DEPTH]
    start = short_of(S, p, depth)
    n, missing = _gather(ctl, S, E, B, root, start, t, W)
    q = W[1, missing] if missing < n else np.int64(-1)
    # Each state without the child may turn its only child into an edge too; a split copies the children of q and what it has just got.
    need = 4 * missing + ((S[q, DEG] >> 8) if q >= 0 else 0)
    if ctl[STATES] + 2 > len(S) or ctl[EDGES] + need > len(E):
        return np.int64(-1)
    new = q
    if missing:
        new = new_state(ctl, S, min(length_of(S, start), depth - 1) + 1, root, owner)
        for j in range(missing):
            _add_child(ctl, S, E, B, W[0, j], t, new)
            W[1, j] = new
    if q >= 0:
        size = min(length_of(S, W[0, missing]), depth - 1) + 1
        if length_of(S, q) != size:
            first = missing
            n = _split(ctl, S, E, B, t, first, n, size, W)
            q = np.int64(S[q, LINK])
        if missing:
            S[new, LINK] = q
        else:
            new = q
    _count(ctl, S, E, root, n, owner, W)
    return new


@kernel
def match(ctl, S, E, B, root, ids, a, b):
    """Longest suffix of ``ids[a:b]`` (at most depth ids) that is stored: (its state, its length)."""
    v, size = np.int64(root), 0
    for i in range(a, b):
        t = ids[i]
        u = child(ctl, S, E, B, v, t)
        while u < 0 and v != root:
            v = S[v, LINK]
            size = length_of(S, v)
            u = child(ctl, S, E, B, v, t)
        if u >= 0:
            v, size = np.int64(u), size + 1
    return v, size


@kernel
def _uncount(ctl, S, E, B, root, t, n, W, dead):
    """Take one occurrence back; returns how many states in ``dead`` have none left."""
    gone, last = 0, np.int64(-1)
    for j in range(n):
        v, u = W[0, j], W[1, j]
        if u != last:
            S[u, COUNT] -= 1
            last = u
            if S[u, COUNT] == 0:
                dead[gone], gone = u, gone + 1
        c = S[u, COUNT]
        if c == 0:
            _drop_child(ctl, S, E, B, v, t)
        elif v != root:
            if W[2, j] >= 0:
                _lower(ctl, S, E, v, W[2, j], c)
            else:
                S[v, BCNT] = c
    return gone


@kernel
def remove_tail(ctl, S, E, B, root, ids, a, b, W, dead):
    """Take back ids [a, b) of a sequence that ends at ``b``; returns the cursor at ``a``. ``W`` and ``dead`` [2, 256] int64 are scratch."""
    depth, last = ctl[DEPTH], 0
    p, _ = match(ctl, S, E, B, root, ids, max(0, a - depth), a)
    cursor = p
    for i in range(a, b):
        n, _ = _gather(ctl, S, E, B, root, short_of(S, p, depth), ids[i], W)
        u = W[1, 0]
        now = _uncount(ctl, S, E, B, root, ids[i], n, W, dead[i & 1])
        # Strings of the last id are the parents of this one's: they could not be freed before their edges were.
        for j in range(last):
            free_state(ctl, S, dead[1 - (i & 1), j])
        last, p = now, u
    for j in range(last):
        free_state(ctl, S, dead[(b - 1) & 1, j])
    return cursor


@kernel
def rehash(ctl, E, B):
    """Fill an empty bucket array from the edges; ``ctl[MASK]`` is its length - 1 already."""
    B[:] = -1
    for e in range(ctl[ETOP]):
        if E[e, FROM] >= 0:
            b = bucket_of(ctl, E[e, FROM], E[e, TOK])
            E[e, CHAIN] = B[b]
            B[b] = e
