"""The block manager against a model of the device: every write, copy and read is played on a dict of block contents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from presage.cache.content import HashedContent
from presage.cache.ledger import HIT
from presage.cache.manager import BlockManager
from presage.core.errors import AuditFailed
from presage.core.kv import KVGeometry, KVGroup
from presage.core.request import Request

BT, MAX_LEN, POISON = 4, 48, ("poison",)


def group(**kw) -> KVGroup:
    return KVGroup(layers=((0, 0),), heads=1, head_dim=1, block_bytes=1, block_tokens=BT, **kw)


GEOMETRIES = {
    "full": (group(),),
    "hybrid": (group(), group(window=6)),
    "sinks": (group(window=9, sinks=3), group(), group(window=5)),
    "lanes": (group(), group(window=6, lane=1)),
    "window": (group(window=7),),
}


class CacheMachine(RuleBasedStateMachine):
    """``memory[g][block][offset]`` is what the device holds: the salt and all ids up to that position, which is what K and V depend on."""

    @initialize(kind=st.sampled_from(sorted(GEOMETRIES)), blocks=st.integers(13, 24))
    def start(self, kind: str, blocks: int) -> None:
        groups = GEOMETRIES[kind]
        self.kv = BlockManager(KVGeometry(groups=groups, num_blocks=(blocks,) * len(groups)), 2, max_len=MAX_LEN, max_num_batched_tokens=MAX_LEN)
        self.memory = [[[POISON] * BT for _ in range(blocks)] for _ in groups]
        self.ids: dict[int, list[int]] = {}
        self.salt: dict[int, bytes] = {}
        self.pinned: list[tuple[int, int]] = []
        self.epoch = 0
        self.made: dict[int, int] = {}

    def truth(self, slot: int, position: int, ids: list[int] | None = None) -> tuple:
        known = self.ids[slot] if ids is None else ids
        return (self.salt[slot], self.made[slot], *known[: position + 1])

    def slots(self, *, running: bool | None = None) -> list[int]:
        return [s for s in sorted(self.ids) if running is None or (self.kv.owned[0][s] > 0) == running]

    def pick(self, data, running: bool | None = None) -> int:
        found = self.slots(running=running)
        assume(found)
        return data.draw(st.sampled_from(found))

    @rule(salt=st.sampled_from([b"", b"x"]), n=st.integers(1, 24), turn=st.integers(0, 24), look=st.booleans())
    def arrive(self, salt: bytes, n: int, turn: int, look: bool) -> None:
        slot = next(s for s in range(99) if s not in self.ids)
        assume(slot < 7)
        # Prompts agree up to `turn`, so that prefixes are often shared.
        self.ids[slot] = [int(i >= turn) for i in range(n)]
        self.salt[slot], self.made[slot] = salt, self.epoch
        self.kv.open(slot, Request(id=str(slot), prompt=np.array(self.ids[slot], np.int32), salt=salt))
        if look:
            self.match(slot)

    def match(self, slot: int) -> None:
        ids = self.ids[slot]
        self.made[slot] = self.epoch
        assert self.kv.match(slot, np.array(ids, np.int32)) == self.brute(slot, ids)

    def brute(self, slot: int, ids: list[int]) -> int:
        content, chain = HashedContent(), [self.kv._roots[slot]]
        for i in range(len(ids) // BT):
            chain.append(content.hashes(slot, i, chain[-1], np.array(ids[i * BT : (i + 1) * BT], np.int32).tobytes()))
        for blocks in range((len(ids) - 1) // BT, 0, -1):
            if all(self.serves(p, chain[1:], blocks) for p in self.kv.pools if p.group.lane == 0):
                return blocks * BT
        return 0

    @staticmethod
    def serves(pool, chain: list[bytes], blocks: int) -> bool:
        tokens = range(blocks * BT)
        first = pool.group.first_kept(blocks * BT)
        return all(chain[t // BT] in pool.where for t in tokens if t >= first or t < pool.group.sinks)

    @rule(data=st.data())
    def rematch(self, data) -> None:
        slot = self.pick(data, running=False)
        grows = self.brute(slot, self.ids[slot]) > self.kv.hit[slot] * BT
        assert not grows or self.kv.grown(np.array([slot], np.int32)) == [slot]
        self.match(slot)

    @rule(data=st.data())
    def step(self, data) -> None:
        kv, ledger = self.kv, self.kv.ledger()
        victims = data.draw(st.lists(st.sampled_from(self.slots(running=True)), max_size=1)) if self.slots(running=True) else []
        for slot in victims:
            ledger.give(slot)
        order = data.draw(st.permutations([s for s in self.slots() if s not in victims]))
        plan = [g for g in (self.grant(data, slot, ledger) for slot in order) if g]
        exact = not victims and self.disjoint([slot for slot, *_ in plan])
        for slot in victims:
            self.kv.drop(slot)
            self.made[slot] = self.epoch
        self.launch(plan)
        left = np.array([p.free for p in kv.pools])
        assert (left >= ledger.free).all()
        assert not exact or (left == ledger.free).all()
        self.settle(data, plan)

    def grant(self, data, slot: int, ledger) -> tuple[int, int, list[int]] | None:
        queued = self.kv.todo[slot] & HIT
        have = int(self.kv.hit[slot]) * BT if queued else int(self.kv.lengths[slot])
        gap = len(self.ids[slot]) - have
        count = data.draw(st.integers(1, gap))
        room = min(4, MAX_LEN - len(self.ids[slot]) - 1) if count == gap else 0
        draft = data.draw(st.lists(st.integers(0, 1), max_size=max(0, room)))
        upto = have + count + len(draft)
        need = ledger.need(np.array([slot], np.int32), np.array([upto], np.int32))[0]
        assert (ledger.whole(slot, upto) >= -(-upto // BT) * np.array([p.window == 0 for p in self.kv.pools])).all()
        # A remembered hit may have shrunk while it was priced: the loop would look again.
        stale = queued and int(self.kv.hit[slot]) * BT != have
        return (slot, upto, draft) if not stale and ledger.take(need) else None

    def disjoint(self, slots: list[int]) -> bool:
        for g, pool in enumerate(self.kv.pools):
            rows = [self.kv.hits[g][s, : self.kv.hit[s]] for s in slots if self.kv.todo[s] & HIT]
            cold = [b for row in rows for b in row.tolist() if b and not pool.refs[b]]
            if len(cold) != len(set(cold)):
                return False
        return True

    def launch(self, plan: list[tuple[int, int, list[int]]]) -> None:
        slots = np.array([g[0] for g in plan], np.int32)
        moves = self.kv.apply(slots, np.array([g[1] for g in plan], np.int32))
        old = [[list(b) for b in pool] for pool in self.memory]
        for g, src, dst in zip(moves.group.tolist(), moves.src.tolist(), moves.dst.tolist(), strict=True):
            self.memory[g][dst] = list(old[g][src])
        for slot, upto, draft in plan:
            ids = self.ids[slot] + draft
            for g, pool in enumerate(self.kv.pools):
                # Lanes other than the lead write everything again: nothing of them is shared.
                for i in range(int(self.kv.lengths[slot]) if pool.lead else 0, upto):
                    block = int(self.kv.tables[g][slot, i // BT])
                    assert block and pool.refs[block] == 1 and block not in pool.keys, "a shared or published block is written"
                    self.memory[g][block][i % BT] = self.truth(slot, i, ids)

    def settle(self, data, plan: list[tuple[int, int, list[int]]]) -> None:
        computed = []
        for slot, upto, draft in plan:
            accepted = data.draw(st.integers(0, len(draft)))
            computed.append(upto - len(draft) + accepted)
            if upto - len(draft) == len(self.ids[slot]):
                self.ids[slot] += [*draft[:accepted], data.draw(st.integers(0, 1))]
        slots = np.array([g[0] for g in plan], np.int32)
        self.kv.commit(slots, np.array(computed, np.int32), lambda s, a, b: np.array(self.ids[s][a:b], np.int32))
        if data.draw(st.booleans()):
            self.kv.trim(slots)
        elif plan:
            self.kv.truncate(plan[0][0], computed[0])
        for slot in slots.tolist():
            if len(self.ids[slot]) >= MAX_LEN - 1:
                self.close(slot)

    @rule(data=st.data())
    def rewind(self, data) -> None:
        slot = self.pick(data)
        n = data.draw(st.integers(0, len(self.ids[slot]) - 1))
        before = int(self.kv.lengths[slot])
        self.kv.truncate(slot, n)
        assert self.kv.lengths[slot] == min(before, n) or (self.kv.lengths[slot] == 0 and any(p.window for p in self.kv.pools))
        if not self.kv.lengths[slot]:
            self.made[slot] = self.epoch
        self.ids[slot] = [*self.ids[slot][:n], data.draw(st.integers(0, 1))]

    @rule(data=st.data())
    def fork(self, data) -> None:
        src = self.pick(data)
        dst = next(s for s in range(99) if s not in self.ids)
        assume(dst < 7)
        n = data.draw(st.integers(0, int(self.kv.lengths[src])))
        self.ids[dst] = [*self.ids[src][:n], *data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))][: MAX_LEN - 1]
        self.salt[dst], self.made[dst] = self.salt[src], self.made[src]
        self.kv.open(dst, Request(id=str(dst), prompt=np.array(self.ids[dst], np.int32), salt=self.salt[src]))
        self.kv.fork(src, dst, n)
        assert self.kv.lengths[dst] == n or self.kv.lengths[dst] == 0
        if not self.kv.lengths[dst]:
            self.made[dst] = self.epoch

    @rule(data=st.data())
    def evict(self, data) -> None:
        slot = self.pick(data)
        self.kv.drop(slot)
        self.made[slot] = self.epoch

    @rule(data=st.data())
    def finish(self, data) -> None:
        self.close(self.pick(data))

    def close(self, slot: int) -> None:
        self.kv.close(slot)
        del self.ids[slot]

    @rule(data=st.data())
    def pin(self, data) -> None:
        slot = self.pick(data, running=True)
        # Only full blocks are shipped while a slot runs; a rewind may still reach into one.
        full = int(self.kv.lengths[slot]) // BT
        assume(full and len(self.pinned) < 2)
        block = int(self.kv.tables[0][slot, full - 1])
        assume(block)
        self.kv.pin(0, [block])
        self.pinned.append((0, block))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        g, block = self.pinned.pop()
        self.kv.unpin(g, [block])

    @rule()
    def reset(self) -> None:
        self.kv.reset()
        self.epoch += 1
        for slot in self.ids:
            if not self.kv.lengths[slot]:
                self.made[slot] = self.epoch
        assert all(not p.where for p in self.kv.pools)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.audit(np.array(sorted(self.ids), np.int32))
        use = self.kv.usage()
        assert use["used"] + use["cached"] + use["free"] == use["total"]
        for g, pool in enumerate(self.kv.pools):
            for block in pool.spare:
                self.memory[g][block] = [POISON] * BT
            if pool.lead:
                self.read_back(g, pool.group)

    def read_back(self, g: int, group: KVGroup) -> None:
        """Whatever the next query of a slot sees is exactly what a lone request would have written."""
        for slot in self.ids:
            length = int(self.kv.lengths[slot])
            for i in (t for t in range(length) if t >= group.first_kept(length) or t < group.sinks):
                block = int(self.kv.tables[g][slot, i // BT])
                assert block and self.memory[g][block][i % BT] == self.truth(slot, i)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, database=None)


@pytest.mark.parametrize("damage", ["reference", "leak", "name", "twice", "dead"])
def test_audit_sees_damage(damage: str) -> None:
    kv = BlockManager(KVGeometry(groups=(group(),), num_blocks=(9,)), max_len=MAX_LEN)
    kv.open(0, Request(id="a", prompt=np.zeros(9, np.int32)))
    kv.apply(np.array([0], np.int32), np.array([9], np.int32))
    kv.commit(np.array([0]), np.array([8]), lambda s, a, b: np.zeros(b - a, np.int32))
    live = np.array([0], np.int32)
    kv.audit(live)
    if damage == "reference":
        kv.pools[0].refs[1] += 1
    elif damage == "leak":
        kv.owned[0][0] -= 1
    elif damage == "name":
        kv.pools[0].where[b"ghost"] = 1
    elif damage == "twice":
        kv.pools[0].spare.append(2)
    else:
        live = np.array([], np.int32)
    with pytest.raises(AuditFailed):
        kv.audit(live)
