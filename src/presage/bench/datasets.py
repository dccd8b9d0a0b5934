"""What is sent: random ids of chosen lengths, or the conversations of a file in ShareGPT's form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from presage.core.errors import ConfigError


class Codec(Protocol):
    """The part of a tokenizer that data sets need."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(slots=True)
class Sample:
    """One prompt: its ``ids`` and its ``text``, and how many tokens to ask for."""

    ids: list[int]
    text: str
    max_tokens: int


def random_ids(count: int, length: int, vocab_size: int, seed: int, banned: frozenset[int] = frozenset()) -> list[list[int]]:
    """``count`` prompts of ``length`` uniformly drawn ids, none of them in ``banned``."""
    allowed = np.setdiff1d(np.arange(vocab_size), np.fromiter(banned, int, len(banned)))
    drawn = np.random.default_rng(seed).choice(allowed, (count, length))
    return [row.tolist() for row in drawn]


def random_lengths(count: int, inputs: int, outputs: int, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths [count] around ``inputs`` and ``outputs``, uniform within plus or minus ``ratio`` of them.

    Raises ConfigError unless 0 <= ratio < 1 and lengths are positive.
    """
    if not 0 <= ratio < 1 or inputs < 1 or outputs < 1:
        raise ConfigError("random lengths must be positive and random_range_ratio between 0 and 1", param="random_input_len")
    rng = np.random.default_rng(seed)
    n_in, n_out = (rng.integers(max(1, int(mean * (1 - ratio))), int(mean * (1 + ratio)) + 1, count) for mean in (inputs, outputs))
    return n_in, n_out


def random_samples(codec: Codec, count: int, inputs: int, outputs: int, ratio: float, prefix: int, seed: int) -> list[Sample]:
    """Random prompts of ``prefix`` shared plus ``inputs`` own tokens; lengths vary uniformly by plus or minus ``ratio`` of themselves.

    Raises ConfigError unless 0 <= ratio < 1 and lengths are positive.
    """
    if prefix < 0:
        raise ConfigError("random_prefix_len must not be negative", param="random_prefix_len")
    n_in, n_out = random_lengths(count, inputs, outputs, ratio, seed)
    shared = random_ids(1, prefix, codec.vocab_size, seed + 1, codec.special_ids)[0]
    own = random_ids(count, int(n_in.max(initial=1)), codec.vocab_size, seed + 2, codec.special_ids)
    prompts = [shared + row[:n] for row, n in zip(own, n_in.tolist())]
    return [Sample(ids, codec.decode(ids), n) for ids, n in zip(prompts, n_out.tolist())]


def read_conversations(path: str) -> list[list[dict[str, Any]]]:
    """The conversations of a .json or .jsonl file: ``[{"conversations": [{"from": ..., "value": ...}, ...]}, ...]``. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = [json.loads(row) for row in text.splitlines() if row.strip()] if path.endswith(".jsonl") else json.loads(text)
        found = [row.get("conversations", row.get("conversation", [])) for row in rows]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of conversations: {error}", param="dataset_path") from None
    return [turns for turns in found if len(turns) >= 2]


def sharegpt_samples(codec: Codec, path: str, count: int, outputs: int | None, max_len: int, seed: int) -> list[Sample]:
    """First questions of shuffled conversations; as many tokens as the recorded answer has, or ``outputs``.

    Pairs under 4 tokens or over ``max_len`` together are left out, as in vLLM. Raises ConfigError if too few remain.
    """
    talks = read_conversations(path)
    found: list[Sample] = []
    for at in np.random.default_rng(seed).permutation(len(talks)):
        if len(found) == count:
            break
        question, answer = (str(turn["value"]) for turn in talks[at][:2])
        ids = codec.encode(question)
        want = outputs or len(codec.encode(answer, add_special_tokens=False))
        if len(ids) >= 4 and want >= 4 and len(ids) + want <= max_len:
            found.append(Sample(ids, question, want))
    if len(found) < count:
        raise ConfigError(f"{path} has {len(found)} usable conversations, {count} were asked for", param="num_prompts")
    return found
