"""What rooms hand to each other in a step: grants, drafts, the plan, its result, and the facts observers see. Plain arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from presage.core.request import TokenLogprobs
from presage.core.types import EMPTY, Bytes, Floats, Ints, Longs, Singles, Words

NO_SINGLES: Singles = np.empty(0, np.float32)
NO_LONGS: Longs = np.empty(0, np.int64)


@dataclass(slots=True, frozen=True)
class Budget:
    """What one step may spend: known tokens, spans, draft nodes, predicted seconds, bytes of saved activations (``carry``)."""

    tokens: int = 2048
    spans: int = 128
    drafts: int = 0
    seconds: float = float("inf")
    carry: int = 1 << 62


@dataclass(slots=True)
class Grants:
    """A scheduler's answer, arrays of length G in plan order. Several rows per slot are legal if the staircase rule holds.

    ``tokens``: known tokens to compute; ``draft``: upper bound of draft nodes; ``start`` -1 = the lane's frontier at launch.
    ``layer0``, ``layer1``: half-open layer range, (0, N) = the whole stack. ``evict`` with ``how``: slots to preempt first.
    ``repeat``: burst length (rows of one token, no drafts). ``why``: (slot, reason code, number) of everything skipped, cut or evicted.
    """

    slot: Ints
    tokens: Ints
    draft: Ints
    start: Ints
    lane: Bytes
    layer0: Ints
    layer1: Ints
    evict: Ints = field(default_factory=lambda: EMPTY)
    how: int = 0
    splits: Ints = field(default_factory=lambda: EMPTY)
    repeat: int = 1
    why: list[tuple[int, int, float]] = field(default_factory=list)
    epoch: Ints = field(default_factory=lambda: EMPTY)

    @classmethod
    def of(
        cls,
        slot: list[int] | Ints,
        tokens: list[int] | Ints,
        layers: int,
        *,
        draft: list[int] | Ints | None = None,
        evict: list[int] | None = None,
        why: list[tuple[int, int, float]] | None = None,
    ) -> Grants:
        """Whole-stack grants of the lead lane at each slot's frontier: what most policies return. ``layers`` = N."""
        s = np.asarray(slot, np.int32)
        n = len(s)
        return cls(
            slot=s,
            tokens=np.asarray(tokens, np.int32),
            draft=np.zeros(n, np.int32) if draft is None else np.asarray(draft, np.int32),
            start=np.full(n, -1, np.int32),
            lane=np.zeros(n, np.uint8),
            layer0=np.zeros(n, np.int32),
            layer1=np.full(n, layers, np.int32),
            evict=np.asarray(evict or [], np.int32),
            why=why or [],
        )

    def select(self, keep: np.ndarray) -> Grants:
        """The grants where ``keep`` (a mask or indices) holds; evictions and reasons stay."""
        return Grants(
            slot=self.slot[keep],
            tokens=self.tokens[keep],
            draft=self.draft[keep],
            start=self.start[keep],
            lane=self.lane[keep],
            layer0=self.layer0[keep],
            layer1=self.layer1[keep],
            evict=self.evict,
            how=self.how,
            splits=self.splits,
            repeat=self.repeat,
            why=self.why,
            epoch=self.epoch[keep] if len(self.epoch) else self.epoch,
        )

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(slots=True)
class Draft:
    """Draft nodes of one step, flat over its grants, parents first.

    ``offset`` [G+1]; ``parent``: index among the grant's own nodes, -1 = child of the last known token; ``depth`` from 1.
    ``prob``: estimated P(accepted) from the root, never above the parent's. ``source``: which drafter proposed the node.
    Trials (one per proposal, in draw order) matter to rejection-type rules only: ``trial_q`` -1 = point mass, else a row of ``q``.
    """

    offset: Ints
    token: Ints
    parent: Ints
    depth: Ints
    prob: Singles
    source: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    trial_node: Ints = field(default_factory=lambda: EMPTY)
    trial_q: Ints = field(default_factory=lambda: EMPTY)
    q: Any = None

    @classmethod
    def none(cls, grants: int) -> Draft:
        """No drafts for ``grants`` grants."""
        return cls(np.zeros(grants + 1, np.int32), EMPTY, EMPTY, EMPTY, NO_SINGLES)

    @classmethod
    def chains(cls, tokens: list[list[int]]) -> Draft:
        """One chain per grant (an empty list: no draft)."""
        counts = np.array([len(t) for t in tokens], np.int32)
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        flat = np.array([t for chain in tokens for t in chain], np.int32)
        place = (np.arange(len(flat)) - np.repeat(offset[:-1], counts)).astype(np.int32)
        return cls(offset, flat, place - 1, place + 1, np.ones(len(flat), np.float32))

    def __len__(self) -> int:
        return len(self.token)


@dataclass(slots=True)
class BlockTable:
    """Physical blocks of the spans of a step in one KV group: span s owns ``blocks[indptr[s]:indptr[s+1]]``.

    ``slots`` [T]: where row t writes its K and V (block * block_tokens + offset), -1 = does not write.
    Entries of freed window blocks are 0, the null block.
    """

    indptr: Ints
    blocks: Ints
    slots: Longs


@dataclass(slots=True)
class Moves:
    """Copies done before the walk: first single slots (accepted tree paths), in order, then whole blocks per group (copy-on-write).

    Slots come first because a block that lost its last accepted row to such a move may be the target of a block copy.
    """

    group: Ints = field(default_factory=lambda: EMPTY)
    src: Ints = field(default_factory=lambda: EMPTY)
    dst: Ints = field(default_factory=lambda: EMPTY)
    row_group: Ints = field(default_factory=lambda: EMPTY)
    row_src: Longs = field(default_factory=lambda: NO_LONGS)
    row_dst: Longs = field(default_factory=lambda: NO_LONGS)

    def __len__(self) -> int:
        return len(self.src) + len(self.row_src)


@dataclass(slots=True)
class StepPlan:
    """What the executor sees. Spans are parallel arrays [S]; rows of span s are ``rows[s]:rows[s+1]``: ``count`` known tokens, then ``nodes``.

    Per row [T]: ``ids`` (-1 = the slot's last sampled id, read on the device), ``position`` = start + depth (turns the rotary),
    ``index`` = place in the KV table, distinct per node. ``ancestors`` [T, W]: bits over keys start+count .. of the span (own bit set),
    None if no span has nodes. ``want`` per span; ``context`` = keys visible by index after this step's writes (start + count).
    ``tables``: one BlockTable per KV group of the lane.
    """

    id: int
    lane: int
    slot: Ints
    start: Ints
    count: Ints
    nodes: Ints
    layer0: Ints
    layer1: Ints
    want: Bytes
    rows: Ints
    ids: Ints
    position: Ints
    index: Ints
    tables: tuple[BlockTable, ...]
    draft: Draft
    ancestors: Words | None = None
    moves: Moves = field(default_factory=Moves)
    rule: str = "keyed"
    late: Any = None
    work: tuple[Any, ...] = ()
    repeat: int = 1
    features: Floats = field(default_factory=lambda: np.zeros(12))
    predicted: float = 0.0

    @property
    def spans(self) -> int:
        """Number of spans."""
        return len(self.slot)


@dataclass(slots=True)
class StepDone:
    """Result of a step. ``path_off``/``path``: accepted node indices (within the span), root to leaf, per span.

    ``new_off``/``new``: ids decided per span (accepted drafts, then the bonus or correction), empty unless SAMPLE.
    ``logprobs``: per span, one entry per new id, for spans whose request asked. ``exports``: by span index: "prompt_logprobs"
    (list[TokenLogprobs]), "pooled" (float32 [d]).
    """

    plan: int
    t0: float
    t1: float
    new_off: Ints
    new: Ints
    path_off: Ints = field(default_factory=lambda: EMPTY)
    path: Ints = field(default_factory=lambda: EMPTY)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    exports: dict[str, dict[int, Any]] = field(default_factory=dict)
    joules: float = 0.0


@dataclass(slots=True)
class StepFault:
    """A step that raised: exactly these slots end (or requeue, if ``retry`` says that nothing was written)."""

    plan: int
    error: str
    slots: Ints
    retry: bool = False


@dataclass(slots=True)
class NewIds:
    """Ids added in a step, flat over slots. ``finish`` [S] holds Finish codes, ``stop`` the stop id or string where one ended it."""

    slot: Ints
    off: Ints
    ids: Ints
    finish: Bytes
    stop: dict[int, int | str] = field(default_factory=dict)


@dataclass(slots=True)
class Keep:
    """A length controller's cut: which draft nodes stay (prefix-closed mask), which grants hold their drafts for a later step."""

    node: np.ndarray
    hold: np.ndarray


@dataclass(slots=True)
class Facts:
    """One finished step, the only thing observers ever see."""

    plan: StepPlan
    grants: Grants
    draft: Draft
    done: StepDone
    new: NewIds


@dataclass(slots=True)
class Verdict:
    """An acceptance rule's answer, per span: accepted node indices (``path_off``, ``path``) and the ids decided (``off``, ``ids``)."""

    path_off: Ints
    path: Ints
    off: Ints
    ids: Ints


@dataclass(slots=True, frozen=True)
class Wake:
    """When the driver must call ``turn`` again: at a time, or when a step ends (``steps``), or on any event."""

    at: float
    steps: bool
