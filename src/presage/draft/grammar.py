"""What a grammar leaves no choice about, as drafts: the rest of a key, a closing tag, a constant.

The text that must come next is the grammar's (XGrammar's jump-forward string); how it is cut into ids is the model's own affair. So it is
drafted, not injected: one step verifies the whole run, and where the model cuts it otherwise only the draft is lost. Jump-forward decoding
(SGLang, Zheng et al., arXiv 2312.07104) without its change of what the model says.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import Draft, Grants, StepDone, StepPlan
from presage.core.protocols import Drafter, EngineView
from presage.core.types import EMPTY, Ints
from presage.draft.sources import sources

ANCHOR = "\n"
"""Text before the run: some tokenizers spell the beginning of a text otherwise than its middle."""
SURE, LAST = 0.97, 0.6
"""Chance of an id of the run, and of its last one, which the model may join with what follows."""


class GrammarDrafter(Drafter):
    """Chains of at most ``num_speculative_tokens`` ids for requests with structured output, none for others. It follows the masker's matchers.

    ``masker``: ``forced(slot) -> str`` and ``constrained() -> slots``; ``tokenizer``: presage.tokenize.Tokenizer. Raises ConfigError for a
    length below 1.
    """

    host, source = True, "grammar"

    def __init__(self, masker: Any, tokenizer: Any, num_speculative_tokens: int = 32) -> None:
        if num_speculative_tokens < 1:
            raise ConfigError("num_speculative_tokens must be at least 1", param="num_speculative_tokens")
        self.masker, self.tokenizer, self.most = masker, tokenizer, num_speculative_tokens
        self.anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
        self._none = EMPTY
        self._spelt: dict[str, list[int]] = {}

    def hint(self, view: EngineView) -> Ints:
        """All it may draft for each constrained slot [C]: what will be forced is not known before the running step has ended."""
        if len(self._none) != len(view.known):
            self._none = np.zeros(len(view.known), np.int32)
        slots = list(self.masker.constrained())
        if not slots:
            return self._none
        out = self._none.copy()
        out[slots] = self.most
        return out

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """The forced run of every slot that has one, cut to its grant."""
        held = self.masker.constrained()
        chains: list[list[int]] = [[]] * len(grants)
        if held:
            room = np.minimum(grants.draft, self.most).tolist()
            chains = [self.spell(self.masker.forced(s))[:n] if n > 0 and s in held else [] for s, n in zip(grants.slot.tolist(), room)]
        if not any(chains):
            return Draft.none(len(grants))
        draft = Draft.chains(chains)
        draft.prob[:] = SURE**draft.depth
        draft.prob[(draft.offset[1:] - 1)[np.diff(draft.offset) > 0]] *= LAST / SURE
        draft.source = sources(len(draft), self.source)
        return draft
        yield  # a generator, as the protocol wants

    def spell(self, text: str) -> list[int]:
        """Ids of ``text`` in the middle of a text; empty if the tokenizer does not spell it back."""
        if text not in self._spelt:
            if len(self._spelt) > 1024:
                self._spelt.clear()
            self._spelt[text] = self._ids(text)
        return self._spelt[text]

    def _ids(self, text: str) -> list[int]:
        whole = self.tokenizer.encode(ANCHOR + text, add_special_tokens=False)
        n = len(self.anchor)
        ids: list[int] = whole[n:] if whole[:n] == self.anchor else self.tokenizer.encode(text, add_special_tokens=False)
        return ids if self.tokenizer.join(ids, False) == text.encode() else []
