"""What is really sent: ids in a vocabulary for workloads that only know lengths or hashes, lengths for those that only know texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from presage.bench.datasets import Codec
from presage.bench.workloads.ragged import Ragged
from presage.bench.workloads.requests import prompt_ids
from presage.bench.workloads.table import Message, Workload
from presage.core.errors import ConfigError


def flat(prompt: str | Sequence[Message]) -> str:
    """A prompt as one text: the contents of its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)


def allowed_ids(vocab_size: int, special: frozenset[int]) -> np.ndarray:
    """Ids that text may have."""
    return np.setdiff1d(np.arange(vocab_size), np.fromiter(special, int, len(special)))


def ids_in(allowed: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Made-up ids mapped into a vocabulary: equal stay equal, unequal ones seldom meet, neighbours do not stay neighbours."""
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return np.asarray(allowed[(mixed * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)) % np.uint64(len(allowed))], np.int32)


def real_ids(w: Workload, codec: Codec) -> Callable[[int], list[int]]:
    """Prompt ids of a row, within the tokenizer's vocabulary; recorded ids stay if they all fit, and are mapped if they do not."""
    allowed = allowed_ids(codec.vocab_size, codec.special_ids)

    def ids(row: int) -> list[int]:
        known = prompt_ids(w, row)
        recorded = w.ids is not None and len(w.ids.row(row)) and int(known.max(initial=0)) < codec.vocab_size
        return known.tolist() if recorded else ids_in(allowed, known).tolist()  # type: ignore[no-any-return]

    return ids


def tokenised(w: Workload, codec: Codec, output_len: int | None = None, default: int = 128) -> Workload:
    """Lengths and ids of a workload of texts. Answers: ``output_len`` if given, else as many tokens as recorded, else ``default``.

    Turns of a growing conversation count what stands in front of them: the turns before and the recorded answers (or ``n_out``).
    """
    if w.prompts is None:
        return w if output_len is None else w.with_columns(n_out=np.full(len(w), output_len))
    own = [codec.encode(flat(p)) for p in w.prompts]
    spoken = w.answers or ("",) * len(w)
    replies = [codec.encode(a, add_special_tokens=False) if a else [] for a in spoken]
    n_out = np.array([output_len or len(r) or default for r in replies])
    if not w.grows:
        return w.with_columns(n_in=[len(i) for i in own], n_out=n_out, ids=Ragged.of(own, np.int32), replies=Ragged.of(replies, np.int32))
    size = np.array([len(i) for i in own])
    for i in np.flatnonzero(w.after >= 0).tolist():
        size[i] += size[w.after[i]] + n_out[w.after[i]]
    return w.with_columns(n_in=size, n_out=n_out)


def within(w: Workload, max_len: int) -> Workload:
    """Chains cut before their first request that would be longer than ``max_len`` tokens, answer included. Raises ConfigError if none stays."""
    fits = w.n_in + w.n_out <= max_len
    for i in np.flatnonzero(w.after >= 0).tolist():
        fits[i] &= fits[w.after[i]]
    if not fits.any():
        raise ConfigError(f"no request of {w.name} fits {max_len} tokens", param="max_model_len")
    return w.take(np.flatnonzero(fits))
