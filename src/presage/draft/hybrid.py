"""Several drafters as one: their drafts merged into one token tree (SpecInfer), or a look-up that stands in for a model where it is sure.

SuffixDecoding (Oliaro et al., NeurIPS 2025) takes the suffix draft of a request when its score, the expected number of accepted tokens,
reaches ``tau``, and the model's draft otherwise; the model is then not run for that request.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack

import msgspec
import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import Draft, Grants, NewIds, StepDone, StepPlan
from presage.core.protocols import Drafter, EngineView
from presage.core.request import Request
from presage.core.types import Ints
from presage.draft.merge import merge
from presage.draft.prune import keep_nodes


class HybridDrafter:
    """Drives ``drafters`` in order; passes that they yield are forwarded, and every companion verb goes to each.

    ``combine``: "merge", or "threshold" with exactly two drafters: the first where its score is at least ``tau``, else the second.
    Merging gives look-ups (``host`` true) the whole grant and those that run passes a share in proportion to their hints, fixed before they
    draw. Raises ConfigError for other settings.
    """

    source = "hybrid"

    def __init__(self, drafters: Sequence[Drafter], combine: str = "merge", tau: float = 3.0) -> None:
        if not drafters:
            raise ConfigError("a hybrid needs at least one drafter", param="drafters")
        if combine not in ("merge", "threshold"):
            raise ConfigError(f"combine must be merge or threshold, not {combine!r}", param="combine")
        if combine == "threshold" and len(drafters) != 2:
            raise ConfigError(f"combine=threshold takes two drafters, got {len(drafters)}", param="drafters")
        self.drafters, self.combine, self.tau = tuple(drafters), combine, tau
        self.host = all(getattr(d, "host", False) for d in drafters)
        self._hints: tuple[Ints, ...] = ()

    # ---- companion: every verb goes to each

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot; if one drafter refuses it, none keeps it."""
        opened: list[Drafter] = []
        try:
            for drafter in self.drafters:
                drafter.open(slot, req)
                opened.append(drafter)
        except Exception:
            for drafter in opened:
                drafter.close(slot)
            raise

    def advance(self, new: NewIds) -> None:
        """Committed ids of one step."""
        for drafter in self.drafters:
            drafter.advance(new)

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``."""
        for drafter in self.drafters:
            drafter.rewind(slot, known)

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` starts as a copy of ``src``."""
        for drafter in self.drafters:
            drafter.fork(src, dst, req)

    def save(self, slot: int) -> bytes | None:
        """The drafters' states in order; None if none has any."""
        blobs = [drafter.save(slot) for drafter in self.drafters]
        return None if all(b is None for b in blobs) else msgspec.msgpack.encode(blobs)

    def load(self, slot: int, blob: bytes) -> None:
        """Restore what ``save`` gave; drafters that saved nothing stay as ``open`` and ``advance`` made them."""
        for drafter, part in zip(self.drafters, msgspec.msgpack.decode(blob, type=list[bytes | None]), strict=True):
            if part is not None:
                drafter.load(slot, part)

    def close(self, slot: int) -> None:
        """The request left the slot."""
        for drafter in self.drafters:
            drafter.close(slot)

    # ---- drafter

    def hint(self, view: EngineView) -> Ints:
        """Merged: the sum of all hints; by threshold: the larger."""
        self._hints = tuple(drafter.hint(view) for drafter in self.drafters)
        out = np.zeros(max(len(h) for h in self._hints), np.int32)
        for h in self._hints:
            out[: len(h)] = out[: len(h)] + h if self.combine == "merge" else np.maximum(out[: len(h)], h)
        return out

    def propose(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        """At most ``grants.draft`` nodes per grant."""
        if self.combine == "threshold":
            return (yield from self._sure_or_model(view, grants))
        drafts, shares = [], self._shares(grants)
        for drafter, share in zip(self.drafters, shares, strict=True):
            drafts.append((yield from drafter.propose(view, _granted(grants, share))))
        return merge(drafts, grants.draft)

    def shut(self) -> None:
        """The engine closes; every drafter is told, whatever another one raises."""
        with ExitStack() as stack:
            for drafter in self.drafters:
                if hasattr(drafter, "shut"):
                    stack.callback(drafter.shut)

    def _sure_or_model(self, view: EngineView, grants: Grants) -> Generator[StepPlan, StepDone, Draft]:
        first = yield from self.drafters[0].propose(view, grants)
        if not len(first):
            return (yield from self.drafters[1].propose(view, grants))
        counts = np.diff(first.offset)
        score = np.bincount(np.repeat(np.arange(len(grants)), counts), first.prob, len(grants))
        sure = score >= self.tau
        if sure.all():
            return first
        rest = grants.select(~sure)
        second = yield from self.drafters[1].propose(view, rest)
        return merge([_only(first, sure), _spread(second, ~sure)], grants.draft)

    def _shares(self, grants: Grants) -> list[Ints]:
        """Nodes each drafter may propose [G]."""
        hints = [_at(h, grants.slot) for h in self._hints] if self._hints else [np.ones(len(grants), np.int32)] * len(self.drafters)
        total = np.maximum(np.sum(hints, axis=0), 1)
        left = grants.draft.copy()
        out = []
        for drafter, h in zip(self.drafters, hints, strict=True):
            if getattr(drafter, "host", False):
                out.append(grants.draft)
                continue
            share = np.minimum(np.minimum(h, -(-grants.draft * h // total)), left).astype(np.int32)
            left -= share
            out.append(share)
        return out


def _at(hint: Ints, slots: Ints) -> Ints:
    """Hints of slots; 0 beyond the end."""
    return np.where(slots < len(hint), hint[np.minimum(slots, len(hint) - 1)], 0).astype(np.int32)


def _granted(grants: Grants, draft: Ints) -> Grants:
    """The same grants with other draft bounds."""
    out = grants.select(slice(None))  # type: ignore[arg-type]
    out.draft = draft
    return out


def _only(draft: Draft, keep: np.ndarray) -> Draft:
    """The draft with grants where ``keep`` [G] is false emptied."""
    counts = np.diff(draft.offset)
    node = np.repeat(keep, counts)
    return draft if node.all() else keep_nodes(draft, node, np.ones(len(counts), np.bool_))


def _spread(draft: Draft, where: np.ndarray) -> Draft:
    """A draft over the grants ``where`` [G] is true as one over all grants."""
    counts = np.zeros(len(where), np.int64)
    counts[where] = np.diff(draft.offset)
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Draft(offset, draft.token, draft.parent, draft.depth, draft.prob, draft.source, draft.trial_node, draft.trial_q, draft.q)
