"""Vocabularies and random walks shared by the grammar tests."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np

import presage
from presage.core.plan import Draft, NewIds, StepPlan
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams, StructuredOutputsParams
from presage.core.types import Want
from presage.tokenize.tokenizer import Tokenizer
from presage.verify.grammar import GrammarCompiler, Masker

BUNDLED = Path(presage.__file__).parent / "bundled" / "presage_tiny"
S = StructuredOutputsParams


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


def compiler(**options: float) -> GrammarCompiler:
    t = tokenizer()
    return GrammarCompiler(t, t.vocab_size, t.eos_ids, **options)


def byte_compiler() -> GrammarCompiler:
    """256 one-byte tokens and the end of text, 256."""
    return GrammarCompiler([bytes([i]) for i in range(256)], 257, [256])


def request(params: S | None, name: str = "r", prompt: int = 3, **more: object) -> Request:
    sampling = SamplingParams(structured_outputs=params, max_tokens=1000, **more.pop("sampling", {}))
    return Request(id=name, prompt=np.arange(prompt, dtype=np.int32), sampling=sampling, **more)


def new_ids(slot: int, ids: list[int]) -> NewIds:
    off = np.array([0, len(ids)], np.int32)
    return NewIds(np.array([slot], np.int32), off, np.array(ids, np.int32), np.zeros(1, np.uint8))


def plan_of(masker: Masker, slots: list[int], draft: Draft | None = None, want: int = int(Want.SAMPLE)) -> StepPlan:
    """A decode step of these slots, one known row each."""
    n = len(slots)
    draft = draft if draft is not None else Draft.none(n)
    nodes = np.diff(draft.offset).astype(np.int32)
    rows = np.concatenate([[0], np.cumsum(1 + nodes)]).astype(np.int32)
    t = int(rows[-1])
    start = np.array([masker.length(s) - 1 for s in slots], np.int32)
    return StepPlan(
        id=1, lane=0, slot=np.array(slots, np.int32), start=start, count=np.ones(n, np.int32), nodes=nodes, layer0=np.zeros(n, np.int32),
        layer1=np.ones(n, np.int32), want=np.full(n, want, np.uint8), rows=rows, ids=np.zeros(t, np.int32), position=np.zeros(t, np.int32),
        index=np.zeros(t, np.int32), tables=(), draft=draft,
    )  # fmt: skip


def mask_of(masker: Masker, slot: int) -> np.ndarray:
    """bool [V]: what the slot may say next."""
    late = masker.late(plan_of(masker, [slot]))
    assert late is not None
    pairs, bits = late.masks()
    assert pairs.tolist() == [[0, -1]]
    return unpacked(bits[0], masker.compiler.vocab_size)


def unpacked(bits: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:size].astype(bool)


Said = tuple[bytes, list[int], bool]


def walk(masker: Masker, slot: int, rng: random.Random, most: int = 200, eager: bool = True) -> Said:
    """Random allowed ids until the text is complete: (bytes, ids, finished). ``eager`` takes the end of text as soon as it is allowed."""
    eos, out = set(masker.compiler.eos_ids), []
    while len(out) < most and not masker.terminated(slot):
        allowed = np.flatnonzero(mask_of(masker, slot)).tolist()
        ends = [i for i in allowed if i in eos]
        pick = ends[0] if ends and (eager or rng.random() < 0.3) else rng.choice(allowed)
        out.append(pick)
        masker.advance(new_ids(slot, [pick]))
    vocab = masker.compiler.info.decoded_vocab
    return b"".join(vocab[i] for i in out if i not in eos), [i for i in out if i not in eos], masker.terminated(slot)
