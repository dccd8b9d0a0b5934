"""A smaller checkpoint as drafter (Leviathan et al., ICML 2023; trees as in SpecInfer, Miao et al., ASPLOS 2024).

Its KV is a lane of its own: same block manager, own blocks. The lane follows the target's known ids: what it computed of a draft that was accepted
is kept, what was rejected is overwritten, and a preempted request's lane starts over, from the prefix cache where that has it.
"""

from __future__ import annotations

import numpy as np

from presage.core.plan import Grants, Moves
from presage.core.protocols import EngineView
from presage.core.types import Ints
from presage.draft.grow import Trees
from presage.draft.lanes import Lanes
from presage.draft.passes import PassDrafter


class ModelDrafter(PassDrafter):
    """``model``: a checkpoint with the target's vocabulary; ``quantization``: a scheme for its weights. The rest as in ``PassDrafter``."""

    source = "model"

    def __init__(
        self,
        model: str,
        num_speculative_tokens: int = 5,
        quantization: str | None = None,
        tree_width: int = 1,
        tree_depth: int | None = None,
        min_prob: float = 0.0,
        *,
        lanes: Lanes,
    ) -> None:
        super().__init__(lanes.model(model, quantization), num_speculative_tokens, tree_width, tree_depth, min_prob)
        self._ahead: dict[int, tuple[int, Ints]] = {}

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``, and their KV."""
        super().rewind(slot, known)
        self._ahead.pop(slot, None)
        if self.lane.cache.lengths[slot] >= known:
            self.lane.cache.truncate(slot, known - 1)

    def _drop(self, slot: int) -> None:
        self._ahead.pop(slot, None)

    def _reserve_blocks(self, view: EngineView, grants: Grants, known: Ints, budget: Ints) -> tuple[Ints, Moves]:
        kv, out = self.lane.cache, budget.copy()
        mine = np.flatnonzero(budget > 0)
        for g in mine.tolist():
            self._keep(int(grants.slot[g]), int(known[g]))
        ledger = kv.ledger()
        need = ledger.need(grants.slot[mine], known[mine] + budget[mine])
        for i, g in enumerate(mine.tolist()):
            if not ledger.take(need[i]):
                out[g] = 0  # memory is short: it goes without drafts until others end
        mine = np.flatnonzero(out > 0)
        return out, kv.apply(grants.slot[mine], (known + out)[mine]) if len(mine) else Moves()

    def _keep(self, slot: int, known: int) -> None:
        """Take over rows of the last draft whose tokens are known by now; look an empty lane's prefix up."""
        kv, begin = self.lane.cache, int(self.start[slot])
        held, (base, tokens) = int(kv.lengths[slot]), self._ahead.pop(slot, (-1, None))
        if tokens is not None and base == held:
            n = min(len(tokens), known - 1 - base)
            same = tokens[:n] == self.tokens.data[begin + base : begin + base + n]
            n = n if same.all() else int(np.argmin(same))
            if n > 0:
                kv.commit(np.array([slot], np.int32), np.array([base + n], np.int32), self._ids)
        if not held:
            kv.match(slot, self.tokens.data[begin : begin + known])

    def _ids(self, slot: int, a: int, b: int) -> Ints:
        return self.tokens.data[self.start[slot] + a : self.start[slot] + b]

    def _note(self, trees: Trees, slots: Ints, known: Ints, alive: np.ndarray) -> None:
        node = trees.kept()
        owner = trees.owner[node]
        for g in np.unique(owner[alive[owner]]).tolist():
            self._ahead[int(slots[g])] = (int(known[g]), trees.token[node[owner == g]])
