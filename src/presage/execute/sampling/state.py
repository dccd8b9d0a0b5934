"""What sampling must remember per request, by slot: parameters as arrays, restrictions as id lists, earlier tokens where they matter.

A slot with default parameters keeps no history and costs nothing per step; ``wants`` says which steps touch a slot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag

import msgspec
import numpy as np

from presage.core.errors import RequestError
from presage.core.plan import NewIds
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.core.types import EMPTY, Floats, Ints, Singles
from presage.execute.sampling.noise import mix_seed


class Touch(IntFlag):
    """Which steps a slot asks for. HISTORY: steps that look at earlier tokens."""

    NONE = 0
    ALLOWED = 1
    BAD_WORDS = 2
    MIN_TOKENS = 4
    BIAS = 8
    PENALTY = 16
    TEMPERATURE = 32
    MIN_P = 64
    TOP_K = 128
    TOP_P = 256
    HISTORY = BAD_WORDS | PENALTY


class Saved(msgspec.Struct, array_like=True):
    """What migrates: the seed (it may stem from the sender's engine seed) and the output ids that penalties look at."""

    seed: int
    out: list[int]


@dataclass(slots=True)
class Counts:
    """Distinct ids of a request: ``ids``, how often each is in the output, whether it is in the prompt. The first ``n`` entries count."""

    ids: Ints
    output: Ints
    prompt: np.ndarray
    n: int
    place: dict[int, int]

    @classmethod
    def of(cls, prompt: np.ndarray) -> Counts:
        """Counts of a prompt with no output."""
        ids = np.unique(prompt).astype(np.int32)
        return cls(ids, np.zeros(len(ids), np.int32), np.ones(len(ids), np.bool_), len(ids), {t: i for i, t in enumerate(ids.tolist())})

    def add(self, token: int, by: int = 1) -> None:
        """Count one output id more (or less)."""
        at = self.place.get(token)
        if at is None:
            at = self.place[token] = self.n
            if at == len(self.ids):
                self._grow()
            self.ids[at], self.output[at], self.prompt[at] = token, 0, False
            self.n += 1
        self.output[at] += by

    def view(self, path: Sequence[int] = ()) -> tuple[Ints, Ints, np.ndarray]:
        """(ids, output counts, in prompt), with the tokens of a draft path counted as output."""
        n = self.n
        if not len(path):
            return self.ids[:n], self.output[:n], self.prompt[:n]
        fresh = [t for t in dict.fromkeys(path) if t not in self.place]
        ids = np.concatenate([self.ids[:n], np.array(fresh, np.int32)])
        output = np.concatenate([self.output[:n], np.zeros(len(fresh), np.int32)])
        place = {t: n + i for i, t in enumerate(fresh)}
        for t in path:
            output[place[t] if t in place else self.place[t]] += 1
        return ids, output, np.concatenate([self.prompt[:n], np.zeros(len(fresh), np.bool_)])

    def _grow(self) -> None:
        more = max(64, len(self.ids))
        self.ids = np.concatenate([self.ids, np.zeros(more, np.int32)])
        self.output = np.concatenate([self.output, np.zeros(more, np.int32)])
        self.prompt = np.concatenate([self.prompt, np.zeros(more, np.bool_)])


@dataclass(slots=True)
class Lists:
    """A slot's id lists. ``out``: output ids, only where a step looks at them. ``prompt``: for counts, rewinds and log-probabilities."""

    prompt: np.ndarray
    params: SamplingParams
    stops: Ints = field(default_factory=lambda: EMPTY)
    allowed: Ints = field(default_factory=lambda: EMPTY)
    bias_ids: Ints = field(default_factory=lambda: EMPTY)
    bias: Singles = field(default_factory=lambda: np.empty(0, np.float32))
    bad_words: list[list[int]] = field(default_factory=list)
    out: list[int] | None = None
    counts: Counts | None = None


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary. Raises RequestError naming the field."""
    for name, ids in (
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids or ()),
        ("bad_words", [t for word in params.bad_words_ids or () for t in word]),
    ):
        wrong = [t for t in ids if not 0 <= t < vocab_size]
        if wrong:
            raise RequestError(f"{name} holds token id {wrong[0]}, the vocabulary has {vocab_size}", param=name)


def request_seed(req: Request, engine_seed: int) -> int:
    """64-bit seed of a request: its own, else one made from its id and the engine's; branches of one request get distinct ones."""
    seed = req.sampling.seed
    if seed is None:
        digest = hashlib.blake2b(f"{engine_seed}:{req.id}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
    seed &= (1 << 64) - 1
    return mix_seed(seed, req.branch) if req.branch else seed


class SamplingState:
    """Companion (``core.protocols``) of the sampler. Arrays [C] by slot double when a slot lies beyond them.

    ``wants`` Touch bits; ``temperature``, ``top_p``, ``min_p``, penalties float; ``top_k`` int32 (0 = off); ``seed`` uint64;
    ``min_tokens``, ``n_prompt``, ``known`` int32; ``logprobs`` and ``prompt_k`` int32, -1 = not asked.
    """

    wants: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    repetition: Floats
    presence: Floats
    frequency: Floats
    seed: np.ndarray
    min_tokens: Ints
    n_prompt: Ints
    known: Ints
    logprobs: Ints
    prompt_k: Ints

    def __init__(self, vocab_size: int, eos_ids: Sequence[int] = (), engine_seed: int = 0, capacity: int = 64) -> None:
        self.vocab_size, self.eos_ids, self.engine_seed = vocab_size, tuple(eos_ids), engine_seed
        self._lists: dict[int, Lists] = {}
        self._watching: set[int] = set()
        for name, (dtype, fill) in _COLUMNS.items():
            setattr(self, name, np.full(capacity, fill, dtype))

    def open(self, slot: int, req: Request) -> None:
        """A request took the slot. Raises RequestError if its parameters name ids outside the vocabulary."""
        check_ids(req.sampling, self.vocab_size)
        while slot >= len(self.wants):
            self._grow()
        for name, (_, fill) in _COLUMNS.items():
            getattr(self, name)[slot] = fill
        p = req.sampling
        self.seed[slot] = request_seed(req, self.engine_seed)
        self.n_prompt[slot] = len(req.prompt)
        self.known[slot] = len(req.prompt) + len(req.emitted)
        self.min_tokens[slot] = p.min_tokens
        self.logprobs[slot] = -1 if p.logprobs is None else p.logprobs
        self.prompt_k[slot] = -1 if p.prompt_logprobs is None else p.prompt_logprobs
        self._open_numbers(slot, p)
        self._lists[slot] = self._make_lists(slot, req)
        self._watch(slot, req.emitted.tolist())

    def advance(self, new: NewIds) -> None:
        """Committed ids of one step."""
        n = np.diff(new.off)
        self.known[new.slot] += n
        if not self._watching:
            return
        for i, slot in enumerate(new.slot.tolist()):
            if slot in self._watching:
                self._append(slot, new.ids[new.off[i] : new.off[i + 1]].tolist())

    def rewind(self, slot: int, known: int) -> None:
        """Forget ids at and after ``known``. A cut inside the prompt leaves a shorter prompt."""
        self.known[slot] = min(known, int(self.known[slot]))
        lists = self._lists[slot]
        shorter = known < int(self.n_prompt[slot])
        if shorter:
            self.n_prompt[slot], lists.prompt = known, lists.prompt[:known]
        if lists.out is None:
            return
        keep = max(0, known - int(self.n_prompt[slot]))
        if shorter:
            self._watch(slot, [])
            return
        for token in lists.out[keep:]:
            if lists.counts is not None:
                lists.counts.add(token, -1)
        del lists.out[keep:]

    def fork(self, src: int, dst: int, req: Request) -> None:
        """``dst`` starts as a copy of ``src`` but samples by ``req``: its parameters, its seed."""
        known, whole = int(self.known[src]), self._lists[src].out
        self.open(dst, req)
        self.known[dst] = known
        # A fork may have turned the source's output into prompt; then its own request says what is output.
        if whole is not None and self._lists[dst].out is not None and self.n_prompt[src] == self.n_prompt[dst]:
            self._watch(dst, list(whole))

    def save(self, slot: int) -> bytes | None:
        """Seed and watched output ids; the receiver opens the request first."""
        return msgspec.msgpack.encode(Saved(int(self.seed[slot]), self._lists[slot].out or []))

    def load(self, slot: int, blob: bytes) -> None:
        """Restore what ``save`` gave into an opened slot."""
        saved = msgspec.msgpack.decode(blob, type=Saved)
        self.seed[slot] = saved.seed
        if self._lists[slot].out is not None:
            self.known[slot] = int(self.n_prompt[slot]) + len(saved.out)
            self._watch(slot, saved.out)

    def close(self, slot: int) -> None:
        """The request left the slot."""
        self._lists.pop(slot, None)
        self._watching.discard(slot)
        self.wants[slot] = 0

    def length(self, slot: int) -> int:
        """Known ids (prompt and output)."""
        return int(self.known[slot])

    def lists(self, slot: int) -> Lists:
        """The slot's id lists. Raises KeyError for a slot that is not open."""
        return self._lists[slot]

    def _open_numbers(self, slot: int, p: SamplingParams) -> None:
        wants = Touch.NONE
        if not p.greedy:
            self.temperature[slot], self.top_p[slot], self.min_p[slot] = p.temperature, p.top_p, p.min_p
            self.top_k[slot] = p.top_k if 0 < p.top_k < self.vocab_size else 0
            wants |= Touch.TEMPERATURE if p.temperature != 1 else 0
            wants |= Touch.MIN_P if p.min_p > 0 else 0
            wants |= Touch.TOP_K if self.top_k[slot] else 0
            wants |= Touch.TOP_P if p.top_p < 1 else 0
        self.repetition[slot], self.presence[slot], self.frequency[slot] = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        wants |= Touch.PENALTY if penalised else 0
        wants |= Touch.MIN_TOKENS if p.min_tokens > 0 else 0
        wants |= Touch.BAD_WORDS if p.bad_words_ids else 0
        wants |= Touch.BIAS if p.logit_bias else 0
        wants |= Touch.ALLOWED if p.allowed_token_ids else 0
        self.wants[slot] = int(wants)

    def _make_lists(self, slot: int, req: Request) -> Lists:
        p, lists = req.sampling, Lists(req.prompt, req.sampling)
        wants = int(self.wants[slot])
        if wants & Touch.MIN_TOKENS:
            lists.stops = np.array(sorted({*self.eos_ids, *(p.stop_token_ids or ())}), np.int32)
        if p.allowed_token_ids:
            lists.allowed = np.unique(np.array(p.allowed_token_ids, np.int32))
        if p.logit_bias:
            lists.bias_ids = np.array(list(p.logit_bias), np.int32)
            lists.bias = np.array(list(p.logit_bias.values()), np.float32)
        lists.bad_words = [list(word) for word in p.bad_words_ids or () if word]
        return lists

    def _watch(self, slot: int, out: list[int]) -> None:
        """Start the slot's history over with the output ids ``out``, if a step looks at it."""
        lists, wants = self._lists[slot], int(self.wants[slot])
        if not wants & Touch.HISTORY:
            return
        self._watching.add(slot)
        lists.out = []
        lists.counts = Counts.of(lists.prompt) if wants & Touch.PENALTY else None
        self._append(slot, out)

    def _append(self, slot: int, ids: list[int]) -> None:
        lists = self._lists[slot]
        if lists.out is not None:
            lists.out.extend(ids)
        if lists.counts is not None:
            for token in ids:
                lists.counts.add(token)

    def _grow(self) -> None:
        for name, (dtype, fill) in _COLUMNS.items():
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full(len(old), fill, dtype)]))


_COLUMNS: dict[str, tuple[type, float]] = {
    "wants": (np.int32, 0),
    "temperature": (np.float64, 0),
    "top_k": (np.int32, 0),
    "top_p": (np.float64, 1),
    "min_p": (np.float64, 0),
    "repetition": (np.float64, 1),
    "presence": (np.float64, 0),
    "frequency": (np.float64, 0),
    "seed": (np.uint64, 0),
    "min_tokens": (np.int32, 0),
    "n_prompt": (np.int32, 0),
    "known": (np.int32, 0),
    "logprobs": (np.int32, -1),
    "prompt_k": (np.int32, -1),
}
