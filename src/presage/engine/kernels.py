"""The loop's inner kernels: project, check, bind, mark, cut, commit over the whole batch in one call each. Compiled once and cached.

Numpy spends a microsecond per operation whatever the batch; a turn of a hundred operations would cost more than a tiny model's step.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import njit

from presage.core.types import Finish, Flag, Kind, State, Want

_IGNORE_EOS, _PROMPT_LP, _PROGRAM = int(Flag.IGNORE_EOS), int(Flag.PROMPT_LOGPROBS), int(Flag.PROGRAM)
_SPECIAL = int(Flag.STOP_IDS | Flag.STOP_STRINGS)
_STOP, _LENGTH = int(Finish.STOP), int(Finish.LENGTH)
_SAMPLE, _POOL, _EXIT, _PLP = int(Want.SAMPLE), int(Want.POOL), int(Want.EXIT), int(Want.PROMPT_LOGPROBS)
_PREFILL, _EMBED = int(Kind.PREFILL), int(Kind.EMBED)
_QUEUED, _RUNNING, _ENDING = int(State.QUEUED), int(State.RUNNING), int(State.ENDING)

# What the loop must still do in Python after a kernel, as bits: the common step sets none of them.
SPECIAL, RECTANGLE, NODES, ENDED, REACHED, DEAD = 1, 2, 4, 8, 16, 32


@njit(cache=True, nogil=True)
def project(state, lead, kind, inflight, known, limit, pending, flying, hit, computed_all, ahead, running, known_v, computed_v, gap):
    """Fill the view's ``known``, ``computed`` and ``gap`` [C]; returns how many of ``running`` are busy."""
    for c in range(len(state)):
        k = known[c] + pending[c]
        done = computed_all[c, lead[c]]
        if ahead:
            # After settling, a sampling slot lacks exactly the KV of its newest id; a chunk lacks what it did not cover.
            done = k - 1 if pending[c] > 0 else done + flying[c]
        if state[c] == _QUEUED:
            done = max(done, hit[c])
        known_v[c], computed_v[c] = k, done
        # Who reaches its limit in flight is not granted: the next token is not ours to want yet.
        gap[c] = 0 if kind[c] <= _PREFILL and k >= limit[c] else k - done
    busy = 0
    for c in running:
        busy += inflight[c] > 0
    return busy


@njit(cache=True, nogil=True)
def check_plain(slot, tokens, draft, start, lane, layer0, layer1, layers, ask, gap, lead, ready, queue, capacity, budget):
    """0 if the grants are legal so far as one pass can tell, else a reason number; -1 asks for the staircase check too."""
    allowed = np.zeros(capacity, np.uint8)
    for c in ready:
        allowed[c] = 1
    for c in queue:
        allowed[c] = 1
    total, rectangles = 0, False
    for i in range(len(slot)):
        c = slot[i]
        if tokens[i] <= 0 or draft[i] < 0 or draft[i] > ask[c]:
            return 1
        if c < 0 or c >= capacity or allowed[c] == 0:
            return 2
        if start[i] >= 0 or layer0[i] != 0 or layer1[i] != layers:
            rectangles = True
            continue
        total += tokens[i]
        if lane[i] == lead[c]:
            allowed[c] = 0
            if tokens[i] > gap[c]:
                return 3
    if total > budget:
        return 4
    return -1 if rectangles else 0


@njit(cache=True, nogil=True)
def bind_spans(slot, tokens, nodes, g_start, layer1, layers, computed_all, lane, lead, kind, flags, known, prompt, start, want, rows):
    """Starts, want bits and row offsets of the spans; returns the number of rows."""
    at = 0
    rows[0] = 0
    for s in range(len(slot)):
        c = slot[s]
        a = computed_all[c, lane] if g_start[s] < 0 else g_start[s]
        start[s] = a
        end = a + tokens[s]
        w = 0
        if layer1[s] == layers and lead[c] == lane:
            if kind[c] <= _PREFILL:
                if end == known[c]:
                    w |= _SAMPLE
            elif kind[c] == _EMBED:
                # A pooling span that reaches the end of its prompt is told to export what it gathered.
                w |= _POOL | _EXIT if end == known[c] else _POOL
            if flags[c] & _PROMPT_LP and a < prompt[c]:
                w |= _PLP
        want[s] = w
        at += tokens[s] + nodes[s]
        rows[s + 1] = at
    return at


@njit(cache=True, nogil=True)
def bind_rows(slot, start, count, nodes, depth, node_off, row_of, arena, node_token, ids, position, index, rows):
    """Fill per-row ids, positions and table indices from per-span grants."""
    for s in range(len(slot)):
        r = rows[s]
        row = row_of[slot[s]]
        for j in range(count[s]):
            p = start[s] + j
            ids[r + j] = arena[row, p]
            position[r + j] = p
            index[r + j] = p
        base = start[s] + count[s]
        r += count[s]
        for j in range(nodes[s]):
            n = node_off[s] + j
            ids[r + j] = node_token[n]
            position[r + j] = base + depth[n] - 1
            index[r + j] = base + j


@njit(cache=True, nogil=True)
def table_size(start, count, nodes, block, indptr):
    """Offsets of the spans' block lists; returns their total length."""
    indptr[0] = 0
    for s in range(len(start)):
        indptr[s + 1] = indptr[s] + (start[s] + count[s] + nodes[s] + block - 1) // block
    return indptr[len(start)]


@njit(cache=True, nogil=True)
def bind_table(slot, rows, index, table, block, indptr, blocks, slots):
    """Fill one KV group's block lists and the slot each row writes."""
    for s in range(len(slot)):
        for b in range(indptr[s + 1] - indptr[s]):
            blocks[indptr[s] + b] = table[slot[s], b]
        for r in range(rows[s], rows[s + 1]):
            i = index[r]
            slots[r] = np.int64(table[slot[s], i // block]) * block + i % block


@njit(cache=True, nogil=True)
def bind_tree(count, nodes, node_off, parent, rows, bits):
    """Ancestor bits (own bit set) of every draft row over its span's nodes; rows of known tokens keep zero."""
    for s in range(len(count)):
        r = rows[s] + count[s]
        for j in range(nodes[s]):
            p = parent[node_off[s] + j]
            if p >= 0:
                for w in range(bits.shape[1]):
                    bits[r + j, w] = bits[r + p, w]
            bits[r + j, j // 64] |= np.uint64(1) << np.uint64(j % 64)


@njit(cache=True, nogil=True)
def mark(slot, start, count, nodes, layer0, layer1, layers, want, inflight, pending, flying, f):
    """Mark the spans in flight and fill the step's features [12] (see ``features.NAMES``)."""
    share = 0.0
    for s in range(len(slot)):
        c = slot[s]
        rows = count[s] + nodes[s]
        sampling = want[s] & _SAMPLE != 0
        inflight[c] += 1
        if sampling:
            pending[c] += nodes[s] + 1
            f[5] += 1 + nodes[s]
            if count[s] == 1:
                f[2] += 1
        if layer1[s] == layers:
            flying[c] += count[s]
        f[0] += rows
        f[4] += nodes[s]
        f[6] += start[s] + rows
        f[7] += float(rows) * (start[s] + rows)
        share += float(layer1[s] - layer0[s]) * rows
    f[1] = len(slot)
    f[3] = f[0] - f[2] - f[4]
    f[8] = share / (layers * max(1.0, f[0]))


@njit(cache=True, nogil=True)
def unmark(slot, count, nodes, layer1, layers, want, epoch_then, inflight, pending, flying, epoch, state, live):
    """Undo ``mark`` and tell which spans still belong to the request they were made for."""
    bits = 0
    for s in range(len(slot)):
        c = slot[s]
        inflight[c] -= 1
        if want[s] & _SAMPLE != 0:
            pending[c] -= nodes[s] + 1
        if layer1[s] == layers:
            flying[c] -= count[s]
        live[s] = epoch[c] == epoch_then[s] and state[c] != _ENDING
        if not live[s]:
            bits |= 32
    return bits


@njit(cache=True, nogil=True)
def cut_ids(slot, off, ids, live, eos, flags, known, prompt, min_tokens, end, keep_off, finish):
    """Offsets of the ids each span keeps and why it ends: eos (unless ignored or below ``min_tokens``), the length ``end``.

    Returns 1 if a span has stops that only Python can check.
    """
    special = 0
    keep_off[0] = 0
    for s in range(len(slot)):
        keep, why = 0, 0
        if live[s]:
            c = slot[s]
            ignore = flags[c] & _IGNORE_EOS
            for j in range(off[s], off[s + 1]):
                keep += 1
                n = known[c] + keep
                stop = False
                if not ignore and n - prompt[c] >= min_tokens[c]:
                    for e in eos:
                        stop = stop or ids[j] == e
                if stop:
                    why = _STOP
                    break
                if n >= end[c]:
                    why = _LENGTH
                    break
            if keep > 0 and flags[c] & _SPECIAL:
                special = 1
        finish[s] = why
        keep_off[s + 1] = keep_off[s] + keep
    return special


@njit(cache=True, nogil=True)
def commit(
    slot,
    start,
    count,
    nodes,
    layer0,
    layer1,
    layers,
    want,
    path_off,
    off,
    ids,
    finish,
    live,
    row_of,
    arena,
    known,
    out,
    last,
    computed,
    kind,
    limit,
    flags,
    done,
):
    """Append ids and advance ``computed``; ``done`` [S] gets each slot's committed tokens. Returns what is left to do as bits."""
    bits = 0
    for s in range(len(slot)):
        c = slot[s]
        for j in range(off[s], off[s + 1]):
            arena[row_of[c], known[c]] = ids[j]
            known[c] += 1
            out[c] += 1
            last[c] = ids[j]
        if not live[s]:
            bits |= 32
            continue
        if layer0[s] == 0 and layer1[s] == layers:
            reached = start[s] + count[s]
            if len(path_off):
                reached += path_off[s + 1] - path_off[s]
            computed[c, 0] = min(reached, known[c] - 1) if kind[c] <= _PREFILL else reached
        else:
            bits |= 2
        if nodes[s] > 0:
            bits |= 4
        if finish[s] > 0 or want[s] & _EXIT != 0:
            bits |= 8
        if flags[c] & _PROGRAM and off[s + 1] > off[s] and known[c] >= limit[c]:
            bits |= 16
        done[s] = computed[c, 0]
    return bits


@njit(cache=True, nogil=True)
def reach(slot, start, tokens, computed, out):
    """Tokens each grant will have computed: from its explicit start (-1: the frontier) on."""
    for i in range(len(slot)):
        out[i] = (computed[slot[i]] if start[i] < 0 else start[i]) + tokens[i]
