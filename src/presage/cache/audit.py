"""The idle audit of one pool: every count is recomputed from what it stands for."""

from __future__ import annotations

import numpy as np

from presage.cache.pool import Pool
from presage.core.errors import AuditFailed
from presage.core.types import Ints


def audit(pool: Pool, name: str, table: Ints, owned: Ints, live: Ints) -> None:
    """Raise AuditFailed naming what is wrong. ``table`` [C, B], ``owned`` [C]; only ``live`` slots may own blocks."""
    dead = np.setdiff1d(np.flatnonzero(owned), live)
    _check(not len(dead), f"{name}: slots {dead.tolist()} are not live and own blocks")
    used = table > 0
    _check(not (used & (np.arange(table.shape[1]) >= owned[:, None])).any(), f"{name}: a table has blocks above what its slot owns")
    for slot in np.flatnonzero(owned).tolist():
        row = table[slot][used[slot]]
        _check(len(np.unique(row)) == len(row), f"{name}: slot {slot} has a block twice")
    refs = np.bincount(table[used], minlength=len(pool.refs)) + pool.pins
    wrong = np.flatnonzero(refs != pool.refs).tolist()
    _check(not wrong, f"{name}: blocks {wrong} have other reference counts than tables and pins")
    _audit_free(pool, name)


def _audit_free(pool: Pool, name: str) -> None:
    unused = [*pool.spare, *pool.cached, *range(pool.fresh, len(pool.refs))]
    _check(len(set(unused)) == len(unused) == pool.free, f"{name}: a block is free twice")
    _check(not pool.refs[unused].any(), f"{name}: a free block is referenced")
    used = int(np.count_nonzero(pool.refs))
    _check(used + len(unused) == pool.total, f"{name}: {used} used + {len(unused)} free blocks are not {pool.total}")
    _check({b: k for k, b in pool.where.items()} == pool.keys, f"{name}: names and blocks disagree")
    nameless = [b for b in pool.cached if b not in pool.keys] + [b for b in pool.spare if b in pool.keys]
    _check(not nameless, f"{name}: blocks {nameless} are named but not revivable, or the reverse")
    _check(all(b < pool.fresh for b in pool.keys), f"{name}: a block was named that was never handed out")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise AuditFailed(message)
