"""From raw logits to the target: an ordered list of small steps, each touching only the rows that ask for it.

Order (vLLM's): grammar mask, allowed ids, bad words, min_tokens, logit_bias, penalties; then, for sampled rows, temperature, min_p, top_k,
top_p. What a step rules out becomes -inf. Reported log-probabilities are of the raw logits, before all of this.
"""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numba import njit

from presage.core.types import Ints, Longs, Singles
from presage.execute.sampling.select import min_p_rows, top_k_rows, top_p_rows
from presage.execute.sampling.state import SamplingState, Touch

NEG_INF = np.float32(-np.inf)


@dataclass(slots=True)
class Group:
    """Rows being modified together. ``slots`` [n]; ``out`` [n]: output tokens before the one the row decides, drafted ones included;
    ``mask`` [n]: row of ``bits`` (int32 [k, W], bit set = allowed) or -1; ``path(j)``: tokens of row j's drafted ancestors, root first."""

    slots: Ints
    out: Ints
    mask: Ints
    bits: np.ndarray | None
    path: Callable[[int], list[int]]


class Step(Protocol):
    """One modification. ``bit``: the Touch flag of slots that ask for it (0: ``applies`` is always asked); ``apply`` edits rows ``which``
    of ``z`` float32 [n, V] in place."""

    bit: int  # plain int: numpy meets an IntFlag's attributes slowly

    def applies(self, state: SamplingState, group: Group) -> np.ndarray:
        """Mask [n] of the rows to touch."""

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""


class _Flagged:
    bit = 0

    def applies(self, state: SamplingState, group: Group) -> np.ndarray:
        """Rows whose slot asks."""
        return (state.wants[group.slots] & self.bit) != 0


@njit("void(f4[:,::1],i8[::1],i4[:,:],i4[::1])", cache=True, nogil=True)
def _mask_rows(z: Any, which: Any, bits: Any, mask: Any) -> None:
    for j in which:
        words = bits[mask[j]]
        for i in range(z.shape[1]):
            w = i >> 5
            if w >= len(words) or not (words[w] >> (i & 31)) & 1:
                z[j, i] = NEG_INF


class GrammarMask:
    """Only what the grammar allows next. Ids beyond the bit mask are not allowed."""

    bit = 0

    def applies(self, state: SamplingState, group: Group) -> np.ndarray:
        """Rows that came with a mask."""
        return group.mask >= 0

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        if group.bits is not None:
            _mask_rows(z, which, group.bits, group.mask)


class AllowedIds(_Flagged):
    """Only ``allowed_token_ids``."""

    bit = int(Touch.ALLOWED)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        for j in which.tolist():
            ids = state.lists(int(group.slots[j])).allowed
            kept = z[j, ids]
            z[j] = NEG_INF
            z[j, ids] = kept


class BadWords(_Flagged):
    """No id that would complete a bad word. As in vLLM, a word's beginning is looked for in the output only."""

    bit = int(Touch.BAD_WORDS)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        for j in which.tolist():
            lists = state.lists(int(group.slots[j]))
            path, longest = group.path(j), max(len(w) for w in lists.bad_words)
            said = ((lists.out or [])[-longest:] + path)[-longest:]
            banned = [w[-1] for w in lists.bad_words if len(w) == 1 or said[1 - len(w) :] == w[:-1]]
            z[j, banned] = NEG_INF


class MinTokens(_Flagged):
    """No end of sequence and no stop id before ``min_tokens`` output tokens."""

    bit = int(Touch.MIN_TOKENS)

    def applies(self, state: SamplingState, group: Group) -> np.ndarray:
        """Rows whose slot asks and has not said enough. A grammar's mask already knows ``min_tokens``, and when the end must be allowed."""
        asks = ((state.wants[group.slots] & self.bit) != 0) & (group.out < state.min_tokens[group.slots])
        return asks & (group.mask < 0)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        for j in which.tolist():
            z[j, state.lists(int(group.slots[j])).stops] = NEG_INF


class LogitBias(_Flagged):
    """Add ``logit_bias``."""

    bit = int(Touch.BIAS)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        for j in which.tolist():
            lists = state.lists(int(group.slots[j]))
            z[j, lists.bias_ids] += lists.bias


@njit("void(f4[::1],i4[::1],i4[::1],b1[::1],f4,f4,f4)", cache=True, nogil=True, error_model="numpy")
def _penalise(row: Any, ids: Any, output: Any, prompt: Any, repetition: float, presence: float, frequency: float) -> None:
    for i in range(len(ids)):
        x = row[ids[i]]
        if output[i] > 0 or prompt[i]:
            x = x / repetition if x > 0 else x * repetition
        if output[i] > 0:
            x = x - frequency * np.float32(output[i]) - presence
        row[ids[i]] = x


class Penalties(_Flagged):
    """Repetition penalty over prompt and output (Keskar et al., CTRL, 2019), then frequency and presence penalties over the output."""

    bit = int(Touch.PENALTY)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        for j in which.tolist():
            slot = int(group.slots[j])
            counts = state.lists(slot).counts
            if counts is not None:
                _penalise(z[j], *counts.view(group.path(j)), state.repetition[slot], state.presence[slot], state.frequency[slot])


class Temperature(_Flagged):
    """Multiply by 1 / temperature, which is what the draw does for rows that need nothing else."""

    bit = int(Touch.TEMPERATURE)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        scale = inverse_temperature(state, group.slots[which])
        for j, s in zip(which.tolist(), scale, strict=True):
            z[j] *= s


class MinP(_Flagged):
    """Keep ids at least ``min_p`` times as likely as the likeliest (Nguyen et al., 2024)."""

    bit = int(Touch.MIN_P)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        min_p_rows(z, which, np.log(state.min_p[group.slots[which]]).astype(np.float32))


class TopK(_Flagged):
    """Keep the ``top_k`` likeliest ids, ties to the lower id."""

    bit = int(Touch.TOP_K)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        top_k_rows(z, which, state.top_k[group.slots[which]].astype(np.int64))


class TopP(_Flagged):
    """Keep the fewest likeliest ids whose probability reaches ``top_p`` (Holtzman et al., 2019), ties to the lower id."""

    bit = int(Touch.TOP_P)

    def apply(self, z: Singles, which: Longs, state: SamplingState, group: Group) -> None:
        """Edit the rows in place."""
        top_p_rows(z, which, state.top_p[group.slots[which]])


def inverse_temperature(state: SamplingState, slots: Ints) -> Singles:
    """1 / temperature as float32 [n]; 1 for greedy slots, whose temperature is kept as 0."""
    t = state.temperature[slots]
    return (1.0 / np.where(t > 0, t, 1.0)).astype(np.float32)


def default_steps() -> tuple[Step, ...]:
    """All steps in their order."""
    return GrammarMask(), AllowedIds(), BadWords(), MinTokens(), LogitBias(), Penalties(), Temperature(), MinP(), TopK(), TopP()
