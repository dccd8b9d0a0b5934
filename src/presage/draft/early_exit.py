"""The target's own first layers as drafter, with its final norm and head on their output (Elhoushi et al., "LayerSkip", ACL 2024).

No second model and no second cache: known tokens have their keys and values in these layers already. The draft's rows are written behind them and
the verification step, which runs the same tokens through all layers, writes them again; what it rejects lies beyond what anyone reads.
"""

from __future__ import annotations

import numpy as np

from presage.core.plan import Grants, Moves
from presage.core.protocols import EngineView
from presage.core.types import Ints
from presage.draft.lanes import Lanes
from presage.draft.passes import PassDrafter, frontiers, held


class EarlyExitDrafter(PassDrafter):
    """``exit_layer``: layers of the target that draft (half of them by default). The rest as in ``PassDrafter``.

    A checkpoint drafts well only if it was trained for it; any checkpoint's output is the same with it and without.
    """

    source = "early_exit"

    def __init__(
        self,
        num_speculative_tokens: int = 3,
        exit_layer: int | None = None,
        tree_width: int = 1,
        tree_depth: int | None = None,
        min_prob: float = 0.0,
        *,
        lanes: Lanes,
    ) -> None:
        layers = len(lanes.target.layers)
        super().__init__(lanes.own(layers // 2 if exit_layer is None else exit_layer), num_speculative_tokens, tree_width, tree_depth, min_prob)

    def _reserve_blocks(self, view: EngineView, grants: Grants, known: Ints, budget: Ints) -> tuple[Ints, Moves]:
        # The end of a prompt would run through these layers twice for one guess: such a request drafts from its next step on.
        budget = np.where(grants.tokens > 1, 0, budget).astype(np.int32)
        if not (budget > 0).any():
            return budget, Moves()
        # Blocks of the whole step, which the scheduler priced: prefix hits of others must be pinned before anything is allocated.
        mine = held(view.table, grants.slot, grants.epoch)
        return budget, self.lane.cache.apply(grants.slot[mine], np.asarray(frontiers(view.table, grants) + grants.draft, np.int32)[mine])
