"""Log-probabilities in the shapes of the two APIs. JSON has no infinity: probabilities of zero are reported as -9999."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from presage.core.request import TokenLogprobs
from presage.tokenize import Tokenizer

FLOOR = -9999.0


def finite(value: float) -> float:
    """A log-probability that JSON can hold."""
    return value if math.isfinite(value) else FLOOR


def shown(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; bytes that are no text by themselves as ``bytes:\\xNN``, so that different tokens look different."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def chat_logprobs(tokenizer: Tokenizer, found: Iterable[TokenLogprobs], k: int) -> dict[str, Any]:
    """OpenAI's chat shape, ``k`` alternatives per token."""
    return {"content": [_chat_token(tokenizer, t, k) for t in found], "refusal": None}


def _chat_token(tokenizer: Tokenizer, t: TokenLogprobs, k: int) -> dict[str, Any]:
    top = [_token(tokenizer, i, p) for i, p in zip(t.top_ids[:k], t.top_logprobs[:k], strict=True)]
    return {**_token(tokenizer, t.id, t.logprob), "top_logprobs": top}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


class CompletionLogprobs:
    """The completions shape, whose ``text_offset`` counts characters over the whole text."""

    def __init__(self, tokenizer: Tokenizer, k: int) -> None:
        self.tokenizer, self.k, self.offset = tokenizer, k, 0

    def block(self, found: Sequence[TokenLogprobs | None], ids: Sequence[int]) -> dict[str, Any]:
        """Entries for ``ids``; None in ``found`` (the first prompt token) has no probability."""
        out: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for t, token_id in zip(found, ids, strict=True):
            out["tokens"].append(shown(self.tokenizer, token_id))
            out["text_offset"].append(self.offset)
            out["token_logprobs"].append(None if t is None else finite(t.logprob))
            out["top_logprobs"].append(None if t is None else self._top(t))
            self.offset += len(self.tokenizer.token_text(token_id))
        return out

    def _top(self, t: TokenLogprobs) -> dict[str, float]:
        # The chosen token comes last, so that it is there even when it is not among the k best.
        pairs = [*zip(t.top_ids[: self.k], t.top_logprobs[: self.k], strict=True), (t.id, t.logprob)]
        return {shown(self.tokenizer, i): finite(p) for i, p in pairs}


def prompt_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt position, id -> logprob, rank, decoded_token; None for the first."""
    return [None if t is None else _candidates(tokenizer, t) for t in found]


def _candidates(tokenizer: Tokenizer, t: TokenLogprobs) -> dict[str, Any]:
    out = {
        str(i): {"logprob": finite(p), "rank": rank, "decoded_token": tokenizer.token_text(i)}
        for rank, (i, p) in enumerate(zip(t.top_ids, t.top_logprobs, strict=True), 1)
    }
    out.setdefault(str(t.id), {"logprob": finite(t.logprob), "rank": t.rank, "decoded_token": tokenizer.token_text(t.id)})
    return out
