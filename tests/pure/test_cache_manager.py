"""What the block manager promises, one promise per test: hits, sharing, prices, eviction order, windows, isolation."""

from __future__ import annotations

import numpy as np
import pytest

from presage.cache.manager import BlockManager
from presage.core.errors import AuditFailed, ConfigError
from presage.core.kv import KVGeometry, KVGroup
from presage.core.request import Request

BT = 4


def group(**kw) -> KVGroup:
    return KVGroup(layers=((0, 0),), heads=1, head_dim=1, block_bytes=1, block_tokens=BT, **kw)


class Engine:
    """A loop in miniature: opens slots, computes their known ids, commits."""

    def __init__(self, *groups: KVGroup, blocks: int = 33, **kw) -> None:
        groups = groups or (group(),)
        self.kv = BlockManager(KVGeometry(groups=groups, num_blocks=(blocks,) * len(groups)), 2, max_len=64, **kw)
        self.ids: dict[int, np.ndarray] = {}

    def open(self, slot: int, ids, **kw) -> int:
        self.ids[slot] = np.asarray(ids, np.int32)
        self.kv.open(slot, Request(id=str(slot), prompt=self.ids[slot], **kw))
        return self.kv.match(slot, self.ids[slot])

    def need(self, slot: int, upto: int) -> list[int]:
        return self.kv.ledger().need(np.array([slot], np.int32), np.array([upto], np.int32))[0].tolist()

    def apply(self, slot: int, upto: int):
        return self.kv.apply(np.array([slot], np.int32), np.array([upto], np.int32))

    def commit(self, slot: int, n: int) -> None:
        self.kv.commit(np.array([slot], np.int32), np.array([n], np.int32), lambda s, a, b: self.ids[s][a:b])

    def run(self, slot: int, ids, **kw) -> int:
        hit = self.open(slot, ids, **kw)
        self.apply(slot, len(ids))
        self.commit(slot, len(ids))
        return hit

    def row(self, slot: int, g: int = 0) -> list[int]:
        return self.kv.tables[g][slot, : self.kv.owned[g][slot]].tolist()

    def audit(self) -> None:
        self.kv.audit(np.array(sorted(self.ids), np.int32))


def test_a_hit_is_whole_blocks_below_the_last_token() -> None:
    e = Engine()
    assert e.run(0, range(12)) == 0
    assert e.open(1, range(12)) == 8  # the last token must be computed
    assert e.open(2, range(13)) == 12
    assert e.open(3, [*range(7), 99, *range(8, 12)]) == 4
    assert e.kv.lengths[2] == 0 and e.kv.owned[0][2] == 0  # remembered, not pinned
    e.apply(2, 13)
    assert e.kv.lengths[2] == 12 and e.row(2)[:3] == e.row(0)
    assert e.kv.usage()["hits"] == 12 and e.kv.usage()["queries"] == 25
    e.audit()


@pytest.mark.parametrize("other", [{"salt": b"b"}, {"model": "b"}, {"adapter": "b"}, {"adapter": ""}, {"salt": b"", "model": "a"}])
def test_salt_model_and_adapter_isolate(other: dict) -> None:
    e = Engine()
    e.run(0, range(12), salt=b"a")
    assert e.open(1, range(12), salt=b"a") == 8
    assert e.open(2, range(12), **({"salt": b"a"} | other)) == 0


def test_fingerprints_name_the_content() -> None:
    a, b = Engine(group(fingerprint=b"1")), Engine(group(fingerprint=b"2"))
    a.run(0, range(8))
    b.run(0, range(8))
    assert a.kv.chain(0) != b.kv.chain(0) and len(a.kv.chain(0)) == 2


def test_caching_off_or_unpublishable_groups_give_no_hits() -> None:
    for e in (Engine(prefix_caching=False), Engine(group(), group(publish="approximate"))):
        e.run(0, range(12))
        assert e.open(1, range(12)) == 0 and not e.kv.chain(0)


def test_only_committed_tokens_are_published() -> None:
    e = Engine()
    e.open(0, range(12))
    e.apply(0, 12)
    e.commit(0, 7)
    assert e.open(1, range(12)) == 4
    version = e.kv.version
    e.commit(0, 8)
    assert e.kv.version > version and e.kv.match(1, e.ids[1]) == 8


def test_hybrid_hit_needs_the_window_only() -> None:
    e = Engine(group(), group(window=6))
    e.run(0, range(20))
    assert e.row(0, 1)[:3] == [0, 0, 0] and all(e.row(0, 1)[3:])
    # The freed window blocks are revivable until they are handed out again.
    assert e.open(1, range(20)) == 16
    assert e.need(1, 20) == [1, 2]  # one of two window blocks is unreferenced: pinning takes it from the free ones
    e.apply(1, 20)
    assert e.row(1, 1)[:2] == [0, 0] and all(e.row(1, 1)[2:])
    e.audit()


def test_two_windows_reach_a_fixed_point() -> None:
    e = Engine(group(), group(window=5), group(window=9))
    e.run(0, range(33))
    e.kv.close(0)
    del e.ids[0]
    chain = Engine(group(), group(window=5), group(window=9))
    chain.run(0, range(33))
    names = chain.kv.chain(0)

    def lose(pool: int, *blocks: int) -> None:
        for i in blocks:
            p = e.kv.pools[pool]
            block = p.where.pop(names[i])
            del p.keys[block], p.cached[block]
            p.spare.append(block)
            p.evictions += 1

    lose(1, 7)  # window 5 reads one block back, window 9 two: not 8, so 7 ..
    lose(2, 5)  # .. which window 9 cannot serve, nor 6, so 5 ..
    lose(1, 4)  # .. which window 5 cannot, so 4
    assert e.open(1, range(33)) == 4 * BT


def test_sinks_are_kept_and_needed() -> None:
    e = Engine(group(window=5, sinks=2))
    e.run(0, range(24))
    assert [b > 0 for b in e.row(0)] == [True, False, False, False, False, True]
    sink = e.row(0)[0]
    e.kv.close(0)
    pool = e.kv.pools[0]
    del pool.where[pool.keys.pop(sink)], pool.cached[sink]
    pool.spare.append(sink)
    pool.evictions += 1
    del e.ids[0]
    assert e.open(1, range(24)) == 0
    e.audit()


def test_least_recently_freed_goes_first_and_tails_before_heads() -> None:
    e = Engine(blocks=9)
    e.run(0, range(12))
    e.run(1, range(100, 112))
    first, second = e.row(0), e.row(1)
    e.kv.close(0)
    e.kv.close(1)
    taken = e.kv.pools[0].take(8)
    assert taken[2:] == [*first[::-1], *second[::-1]]  # two blocks were never used
    assert not e.kv.pools[0].where


def test_a_hit_moves_a_block_out_of_the_way_of_eviction() -> None:
    e = Engine(blocks=7)
    e.run(0, range(12))
    e.kv.close(0)
    assert e.run(1, range(9)) == 8
    e.open(2, range(50, 62))
    version = e.kv.version
    e.apply(2, 12)  # 3 blocks: 2 unused ones and the evicted tail of slot 0
    assert e.kv.version == version + 1
    assert e.kv.usage()["cached"] == 0
    assert e.open(3, range(12)) == 8


def test_an_evicted_hit_is_cut_when_priced_and_applied() -> None:
    e = Engine(blocks=7)
    e.run(0, range(12))
    e.kv.close(0)
    assert e.open(1, range(12)) == 8
    version = e.kv.version
    e.run(2, range(50, 67))  # 5 blocks: only the head of slot 0 is left
    assert e.kv.version > version
    assert e.need(1, 12) == [3]  # two above the hit, and the hit itself is unreferenced
    e.kv.close(2)
    del e.ids[2], e.ids[0]
    e.apply(1, 12)
    assert e.kv.lengths[1] == 4
    e.audit()


def test_fork_shares_and_the_writers_copy() -> None:
    e = Engine()
    e.run(0, range(10))
    e.open(1, range(11))
    e.kv.fork(0, 1, 10)
    assert e.row(0) == e.row(1)
    assert e.need(0, 11) == e.need(1, 11) == [1]
    before = e.kv.ledger().free[0]
    moves = e.apply(1, 11)
    assert moves.src.tolist() == [e.row(0)[2]] and moves.dst.tolist() == [e.row(1)[2]] and moves.group.tolist() == [0]
    assert e.row(0)[:2] == e.row(1)[:2] and before - e.kv.ledger().free[0] == 1
    assert e.need(0, 11) == [0] and not len(e.apply(0, 11))  # alone again: written in place
    e.audit()


def test_forks_written_in_one_plan_cost_what_was_priced() -> None:
    e = Engine()
    e.run(0, range(10))
    for slot in (1, 2):
        e.open(slot, range(10))
        e.kv.fork(0, slot, 10)
    slots, upto = np.arange(3, dtype=np.int32), np.full(3, 14, np.int32)
    ledger = e.kv.ledger()
    need = ledger.need(slots, upto).sum(0)
    assert need.tolist() == [6] and ledger.take(need)
    moves = e.kv.apply(slots, upto)
    assert e.kv.pools[0].free == ledger.free[0]
    # A source must not be a destination or be handed out before the copies were submitted.
    assert not set(moves.src.tolist()) & set(moves.dst.tolist()) and moves.src[0] not in e.kv.tables[0]
    e.audit()
    assert e.kv.ledger().free[0] == ledger.free[0] + 1


def test_rewinding_into_a_published_block_copies_it() -> None:
    e = Engine()
    e.run(0, range(12))
    e.kv.truncate(0, 6)
    assert e.kv.lengths[0] == 6 and len(e.row(0)) == 2 and len(e.kv.chain(0)) == 1
    assert e.need(0, 8) == [1]
    old = e.row(0)[1]
    assert e.apply(0, 8).src.tolist() == [old] and e.row(0)[1] != old
    e.ids[0] = np.array([0, 1, 2, 3, 4, 5, 77, 78, 79], np.int32)
    e.commit(0, 8)
    assert e.open(1, range(12)) == 8 and e.open(2, e.ids[0]) == 8  # both contents can be found
    e.audit()


def test_rejected_drafts_leave_no_blocks_and_no_names() -> None:
    e = Engine()
    e.open(0, range(6))
    e.apply(0, 6 + 9)
    e.commit(0, 6)
    free = e.kv.pools[0].free
    e.kv.trim(np.array([0]))
    assert len(e.row(0)) == 2 and e.kv.pools[0].free == free + 2 and len(e.kv.pools[0].where) == 1
    e.audit()


def test_a_rewind_past_the_window_drops_everything() -> None:
    e = Engine(group(window=6))
    e.run(0, range(24))
    e.kv.truncate(0, 8)
    assert e.kv.lengths[0] == 0 and not e.row(0)
    e.run(1, range(24))
    e.kv.truncate(1, 23)
    assert e.kv.lengths[1] == 23
    e.open(2, range(8))
    e.kv.fork(1, 2, 8)
    assert e.kv.lengths[2] == 0 and not e.row(2)
    e.audit()


def test_drop_keeps_the_chain_and_readmission_hits() -> None:
    e = Engine()
    e.run(0, range(12))
    chain = e.kv.chain(0)
    e.kv.drop(0)
    assert e.kv.usage()["used"] == 0 and e.kv.chain(0) == chain
    assert e.kv.match(0, e.ids[0]) == 8
    assert e.need(0, 12) == [3]  # unreferenced blocks count as free until they are pinned
    e.apply(0, 12)
    e.audit()


def test_reset_forgets_and_old_kv_is_never_published() -> None:
    e = Engine()
    e.run(0, range(8))
    e.open(1, range(50, 58))
    e.apply(1, 8)  # its first chunk is in flight while the weights change
    version = e.kv.version
    e.kv.reset()
    assert e.kv.version > version
    e.commit(1, 8)
    e.ids[0] = np.arange(12, dtype=np.int32)
    e.apply(0, 12)
    e.commit(0, 12)
    e.open(2, range(12))
    e.kv.fork(0, 2, 8)
    e.apply(2, 12)
    e.commit(2, 12)
    assert not e.kv.pools[0].where
    e.kv.drop(0)
    e.apply(0, 12)
    e.commit(0, 12)
    assert e.open(3, range(12)) == 8  # recomputed under the new weights
    e.audit()


def test_ledger_prices_hits_and_victims() -> None:
    e = Engine(blocks=9)
    e.run(0, range(12))
    assert e.open(1, range(12)) == 8
    assert e.need(1, 12) == [1]
    ledger = e.kv.ledger()
    ledger.give(0)
    assert ledger.free[0] == 5 + 1  # two of its blocks stay: the waiting hit counts on them
    assert not ledger.take(np.array([7])) and ledger.free[0] == 6


def test_victims_that_share_free_the_shared_blocks_together() -> None:
    e = Engine()
    e.run(0, range(8))
    e.run(1, range(9))
    ledger = e.kv.ledger()
    free = int(ledger.free[0])
    ledger.give(0)
    assert ledger.free[0] == free
    ledger.give(1)
    assert ledger.free[0] == free + 3


def test_whole_bounds_what_chunks_hold() -> None:
    e = Engine(group(), group(window=7, sinks=5), max_num_batched_tokens=6)
    e.open(0, range(60))
    whole, most = e.kv.ledger().whole(0, 60), np.zeros(2, int)
    for n in range(6, 61, 6):
        e.apply(0, n)
        most = np.maximum(most, [np.count_nonzero(t[0]) for t in e.kv.tables])
        e.commit(0, n)
    assert (most <= whole).all() and whole[0] == 15 and whole[1] < 9


def test_other_lanes_are_allocated_but_not_shared() -> None:
    e = Engine(group(), group(window=5, lane=1))
    e.run(0, range(24))
    assert all(e.row(0, 1)) and not e.kv.pools[1].where
    assert e.open(1, range(24)) == 20
    assert e.need(1, 24) == [1, 6]
    e.apply(1, 24)
    e.open(2, range(24))
    e.kv.fork(0, 2, 24)
    assert len(e.row(2)) == 6 and not e.row(2, 1)
    e.audit()


def test_pins_outlive_their_slot() -> None:
    e = Engine()
    e.run(0, range(12))
    blocks = e.row(0)
    e.kv.pin(0, blocks[:2])
    e.kv.close(0)
    del e.ids[0]
    e.audit()
    assert e.kv.usage()["used"] == 2
    e.kv.unpin(0, blocks[:2])
    assert e.kv.usage()["used"] == 0
    e.audit()


def test_recorded_names_replace_hashes() -> None:
    class Recorded:
        def __init__(self, names: dict[str, list[bytes]]) -> None:
            self.names, self.at = names, {}

        def root(self, slot: int, req: Request, groups) -> bytes:
            self.at[slot] = self.names[req.id]
            return b""

        def hashes(self, slot: int, index: int, parent: bytes, ids_bytes: bytes) -> bytes:
            return self.at[slot][index]

    real = Engine()
    hits = [real.run(0, range(12)), real.run(1, [*range(9), 5, 5, 5])]
    replay = Engine(content=Recorded({str(s): real.kv.chain(s) for s in (0, 1)}))
    assert [replay.run(s, np.full(12, -1)) for s in (0, 1)] == hits == [0, 8]
    assert replay.row(1) == real.row(1)


def test_names_are_computed_once() -> None:
    class Counting:
        calls = 0

        def root(self, slot: int, req: Request, groups) -> bytes:
            return req.salt

        def hashes(self, slot: int, index: int, parent: bytes, ids_bytes: bytes) -> bytes:
            self.calls += 1
            return parent + ids_bytes

    content = Counting()
    e = Engine(content=content)
    e.run(0, range(32))
    e.kv.drop(0)
    assert e.kv.match(0, e.ids[0]) == 28 and content.calls == 8
    e.open(1, range(100, 164))
    assert content.calls == 9  # a cold prompt is hashed as it is computed, not at arrival


def test_growing_keeps_what_is_there() -> None:
    e = Engine()
    e.run(0, range(12))
    row = e.row(0)
    assert e.run(9, range(12)) == 8
    assert e.row(0) == row and e.row(9)[:2] == row[:2] and len(e.kv.lengths) >= 10
    e.kv.grow(4)
    assert len(e.kv.lengths) >= 10
    e.audit()


def test_misuse_is_named() -> None:
    with pytest.raises(ConfigError, match="block_tokens"):
        Engine(group(), KVGroup(layers=(), heads=1, head_dim=1, block_bytes=1, block_tokens=8))
    e = Engine(blocks=3)
    e.open(0, range(12))
    with pytest.raises(AuditFailed, match="3 blocks"):
        e.apply(0, 12)
    with pytest.raises(AuditFailed, match="past max_len"):
        e.apply(0, 65)
    with pytest.raises(AuditFailed, match="distinct"):
        e.kv.apply(np.array([0, 0], np.int32), np.array([4, 8], np.int32))
    with pytest.raises(AuditFailed, match="twice"):
        e.kv.open(0, Request(id="0", prompt=np.zeros(1, np.int32)))
    with pytest.raises(AuditFailed, match="cannot share"):
        e.kv.fork(0, 1, 3)


def test_rewriting_a_queued_request_forgets_its_hit() -> None:
    e = Engine()
    e.run(0, range(12))
    assert e.open(1, range(12)) == 8
    e.kv.truncate(1, 5)
    e.ids[1] = np.array([0, 1, 2, 3, 4, 70, 71, 72, 73], np.int32)
    assert e.need(1, 9) == [3]
    assert e.kv.match(1, e.ids[1]) == 4 and e.need(1, 9) == [2]
    e.apply(1, 9)
    assert e.row(1)[0] == e.row(0)[0] and e.row(1)[1] != e.row(0)[1]
    e.audit()
